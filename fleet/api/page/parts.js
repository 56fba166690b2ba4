// What the pages are made of. Text of devices goes into text nodes alone: a device is not trusted.

import { within } from "./api.js";

export const { h, render } = preact;
export const { useState, useEffect, useRef, useMemo, useCallback, useLayoutEffect } = preactHooks;
export const html = htm.bind(h);

const ROLES = ["viewer", "operator", "releaser", "admin"];
export const may = (me, role) => ROLES.indexOf(me.role) >= ROLES.indexOf(role);

const changed = new EventTarget();
/** Say that something in the fleet has changed, so that what is shown is read again. */
export function announce() {
  for (const one of kept.values()) one.at = -Infinity;
  changed.dispatchEvent(new Event("changed"));
}

// What a page showed last and when that was read, so that who comes back sees it at once. It is read again when it is
// as old as it would have become on the screen, or when the fleet has changed meanwhile.
const kept = new Map();
/** Forget what was shown, as when somebody else signs in. */
export const forget = () => kept.clear();

/** Read something now, every `every` milliseconds, and when the fleet has changed. The last good data stays shown.
 *  `name`: keep it under this name for the next time that the page is looked at. */
export function useData(load, keys, every = 10000, name = null) {
  const [found, setFound] = useState({ data: kept.get(name)?.data ?? null, error: null });
  const state = useRef({ busy: false, again: false, current: 0, left: new AbortController() });
  const read = useCallback(async () => {
    const mine = state.current.current;
    if (state.current.busy) { state.current.again = true; return; }
    state.current.busy = true;
    try {
      const data = await within(state.current.left.signal, load);
      if (name !== null) kept.set(name, { data, at: performance.now() });
      if (mine === state.current.current) setFound({ data, error: null });
    } catch (error) {
      if (mine === state.current.current) setFound((before) => ({ ...before, error }));
    }
    state.current.busy = false;
    if (state.current.again) { state.current.again = false; read(); }
  }, keys);
  useEffect(() => {
    state.current = { busy: false, again: false, current: state.current.current + 1, left: new AbortController() };
    setFound((before) => ({ data: before.data, error: null }));
    let soon = null, timer = null;
    const wait = (time) => { timer = setTimeout(() => { if (!document.hidden) read(); wait(every); }, time); };
    const left = kept.has(name) ? kept.get(name).at + every - performance.now() : 0;
    if (left > 0) wait(left);
    else { read(); wait(every); }
    const heard = () => { soon ??= setTimeout(() => { soon = null; read(); }, 1000); };
    changed.addEventListener("changed", heard);
    return () => { state.current.current += 1; state.current.left.abort(); clearTimeout(timer); clearTimeout(soon); changed.removeEventListener("changed", heard); };
  }, [read, every]);
  return { ...found, reload: read };
}

export function ageText(seconds) {
  if (seconds === null || seconds === undefined) return "never";
  for (const [limit, unit, name] of [[120, 1, "s"], [7200, 60, "min"], [172800, 3600, "h"]]) {
    if (seconds < limit) return `${Math.round(seconds / unit)} ${name}`;
  }
  return `${Math.round(seconds / 86400)} d`;
}
/** How long something takes. */
export const duration = (seconds) => (seconds < 1 ? "under 1 s" : ageText(seconds));
export const Ago = ({ seconds }) => html`<span class="quiet">${seconds === null || seconds === undefined ? "never" : `${ageText(seconds)} ago`}</span>`;
/** In the zone of who looks; the exact time is the title. */
export function Time({ at }) {
  if (!at) return html`<span class="quiet">-</span>`;
  const date = new Date(at);
  return html`<time datetime=${at} title=${date.toISOString()}>${date.toLocaleString()}</time>`;
}
export const bytes = (count) =>
  count >= 1e9 ? `${(count / 1e9).toFixed(2)} GB` : count >= 1e6 ? `${(count / 1e6).toFixed(1)} MB` : `${count} B`;
export const number = (value, digits = 1) => (value === null || value === undefined ? "-" : value.toFixed(digits));
export const plural = (count, one) => `${count.toLocaleString()} ${one}${count === 1 ? "" : "s"}`;
export const median = (values) => quantile(values, 0.5);
/** The least of the values that has this share of them at or below it; null of none. */
export function quantile(values, share) {
  if (!values.length) return null;
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
}

export const Problem = ({ error }) =>
  error ? html`<p class="problem" role="alert">${error.message}${error.code ? html` <code>${error.code}</code>` : null}</p>` : null;
export const Empty = ({ children }) => html`<p class="empty">${children}</p>`;
export const State = ({ name, tone }) => html`<span class=${`state ${tone ?? toneOf(name)}`}>${name.replaceAll("_", " ")}</span>`;
export function toneOf(name) {
  if (["committed", "completed", "online", "succeeded", "published"].includes(name)) return "good";
  if (["failed", "rolled_back", "taken_back", "reverted", "aborted", "incomplete", "stopping", "taking_back", "withdrawn", "revoked", "offline"].includes(name)) return "bad";
  if (["paused", "approving", "unknown"].includes(name)) return "wait";
  return "plain";
}

export function Table({ label, columns, rows, empty }) {
  if (!rows.length) return html`<${Empty}>${empty}<//>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}><table>
    <thead><tr>${columns.map((column) => html`<th scope="col" class=${column.right ? "right" : ""}>${column.name}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr key=${row.key}>${row.cells.map((cell, index) => html`<td class=${columns[index].right ? "right" : ""}>${cell}</td>`)}</tr>`)}</tbody>
  </table></div>`;
}

/** A button that asks first. `what` says what it does and to how many devices; `act` does it. */
export function Action({ label, what, act, danger, fields }) {
  const dialog = useRef(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [values, setValues] = useState({});
  async function confirm(event) {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await act(values);
      dialog.current?.close();
      announce();
    } catch (problem) { setError(problem); }
    setBusy(false);
  }
  return html`<button type="button" class=${danger ? "danger" : ""} onClick=${() => { setError(null); dialog.current.showModal(); }}>${label}</button>
    <dialog ref=${dialog} aria-label=${label}><form onSubmit=${confirm}>
      <h2>${label}</h2><p>${what}</p>
      ${(fields ?? []).map((field) => html`<label>${field.label}
        <input value=${values[field.name] ?? ""} placeholder=${field.placeholder ?? ""} required=${field.required ?? false}
          onInput=${(event) => setValues({ ...values, [field.name]: event.target.value })}/></label>`)}
      <${Problem} error=${error}/>
      <p class="buttons"><button type="button" class="plain" onClick=${() => dialog.current.close()}>Leave it</button>
      <button type="submit" class=${danger ? "danger" : ""} disabled=${busy}>${busy ? "Working …" : label}</button></p>
    </form></dialog>`;
}

/** Pages of a list: `load(after)` returns `{items, next}`. */
export function usePages(load, keys) {
  const [stack, setStack] = useState([null]);
  useEffect(() => setStack([null]), keys);
  const after = stack[stack.length - 1];
  const found = useData(() => load(after), [...keys, after]);
  const turn = html`<nav class="pages" aria-label="Pages of this list">
    <button type="button" class="plain" disabled=${stack.length < 2} onClick=${() => setStack(stack.slice(0, -1))}>Back</button>
    <span class="quiet">page ${stack.length}</span>
    <button type="button" class="plain" disabled=${!found.data?.next} onClick=${() => setStack([...stack, found.data.next])}>More</button></nav>`;
  return { ...found, turn: stack.length > 1 || found.data?.next ? turn : null };
}
