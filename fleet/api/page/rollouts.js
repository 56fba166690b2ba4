// Rollouts: what one would do, start it, watch its waves and its evidence, decide, and read why it ended.
import { at, get, post } from "./api.js";
import { Action, Empty, Problem, State, Table, Time, bytes, duration, html, may, number, plural, useData, usePages, useState } from "./parts.js";

export function Rollouts({ me }) {
  const { data, error, turn } = usePages((after) => get(`/rollouts?limit=50${after ? `&after=${encodeURIComponent(after)}` : ""}`), []);
  return html`<h1>Rollouts</h1>${may(me, "releaser") ? html`<p class="buttons"><a class="button" href="#/rollouts/new">New rollout</a></p>` : null}<${Problem} error=${error}/>
    ${data ? html`<${Table} label="Rollouts" empty="There was no rollout yet. A rollout changes the model on devices wave by wave, and stops itself if inference gets worse."
      columns=${[{ name: "Rollout" }, { name: "State" }, { name: "Wave" }, { name: "Devices" }, { name: "Why" }, { name: "Started" }, { name: "By" }]}
      rows=${data.items.map((one) => ({ key: one.rollout, cells: [html`<a href=${`#/rollouts/${one.rollout}`}>${one.rollout}</a>`, html`<${State} name=${one.state}/>`, `${one.wave} of ${one.waves.length}`, one.selector, one.reason, html`<${Time} at=${one.created_at}/>`, one.created_by] }))}/>` : null}${turn}`;
}

export function Rollout({ me, name }) {
  const rollout = useData(() => get(at`/rollouts/${name}`), [name], 3000);
  const devices = usePages((after) => get(`${at`/rollouts/${name}/devices`}?limit=100${after ? `&after=${encodeURIComponent(after)}` : ""}`), [name]);
  const artifacts = useData(() => get("/artifacts?limit=500"), [], 60000);
  const names = Object.fromEntries((artifacts.data?.items ?? []).map((one) => [one.digest, one.artifact]));
  const one = rollout.data;
  if (!one) return html`<h1>${name}</h1><${Problem} error=${rollout.error}/>`;
  const control = (body) => () => post(at`/rollouts/${name}/control`, body);
  const touched = (one.stages ?? []).reduce((sum, stages) => sum + Object.entries(stages).reduce((all, [stage, count]) => all + (["waiting", "assigned"].includes(stage) ? 0 : count), 0), 0);
  return html`<h1>${one.rollout} <${State} name=${one.state}/></h1><${Problem} error=${rollout.error}/>
    ${one.reason ? html`<p class=${one.final && one.state === "completed" ? "note" : "note bad"} role="status">${one.reason}</p>` : null}
    <dl class="facts"><dt>Devices</dt><dd>${one.selector}</dd><dt>Artifacts</dt><dd>${one.artifacts.map((digest) => names[digest] ?? digest.slice(0, 12)).join(", ")}</dd>
      <dt>Started</dt><dd><${Time} at=${one.created_at}/> by ${one.created_by}</dd>${one.due_at && !one.final ? html`<dt>Next step by</dt><dd><${Time} at=${one.due_at}/></dd>` : null}
      ${one.opens_at ? html`<dt>Orders nothing until</dt><dd><${Time} at=${one.opens_at}/>: ${one.windows.join(" or ")}</dd>` : null}
      ${one.left_behind ? html`<dt>Left behind</dt><dd>${plural(one.left_behind, "device")}</dd>` : null}</dl>
    ${may(me, "operator") && !one.final ? html`<p class="buttons">
      ${one.state === "paused" ? html`<${Action} label="Resume" what=${`Goes on with wave ${one.wave} of ${one.waves.length}.`} act=${control({ action: "resume" })}/>` : html`<${Action} label="Pause" what="Orders no further device until it is resumed; devices that are under way go on." act=${control({ action: "pause" })}/>`}
      ${one.state === "approving" ? html`<${Action} label="Approve" what=${`Lets wave ${one.wave + 1} of ${one.waves.length} (${one.waves[one.wave] ?? "the next"}) begin.`} act=${control({ action: "approve" })}/>` : null}
      <${Action} label="Abort, keep" danger what=${`Ends it. ${plural(touched, "device")} that were ordered keep what they have.`} act=${control({ action: "abort", revert: false })}/>
      <${Action} label="Abort, take back" danger what=${`Ends it, and takes ${plural(touched, "device")} back to what ran before, the last changed first.`} act=${control({ action: "abort", revert: true })}/></p>` : null}
    <h2>Waves</h2>
    <${Table} label="Waves" empty="" columns=${[{ name: "Wave" }, { name: "Takes" }, { name: "Devices" }, { name: "", right: false }]}
      rows=${one.waves.map((wave, index) => ({ key: index, cells: [html`${index + 1}${index + 1 === one.wave && !one.final ? " (now)" : ""}`, wave,
        Object.entries(one.stages?.[index] ?? {}).map(([stage, count]) => `${count} ${stage.replaceAll("_", " ")}`).join(", ") || "not begun", html`<${Bar} stages=${one.stages?.[index] ?? {}}/>`] }))}/>
    <h2>The gate's evidence</h2>
    <${Evidence} findings=${one.findings}/>
    <h2>Devices</h2><${Problem} error=${devices.error}/>
    <${Table} label="Devices of the rollout" empty="No device was assigned yet." columns=${[{ name: "Wave" }, { name: "Device" }, { name: "Stage" }, { name: "Cohort" }, { name: "Why" }]}
      rows=${(devices.data?.items ?? []).map((row) => ({ key: row.device, cells: [row.wave, html`<a href=${`#/devices/${row.device}`}>${row.device}</a>`, html`<${State} name=${row.stage}/>`, row.cohort, row.reason ?? ""] }))}/>${devices.turn}`;
}

function Bar({ stages }) {
  const all = Object.values(stages).reduce((sum, count) => sum + count, 0);
  if (!all) return null;
  let left = 0;
  return html`<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">${Object.entries(stages).map(([stage, count]) => {
    const x = left; left += (100 * count) / all;
    return html`<rect class=${stage} x=${x} y="0" width=${(100 * count) / all} height="8"/>`;
  })}</svg>`;
}

function Evidence({ findings }) {
  const rows = (findings?.findings ?? []).filter((row) => !row.text.includes(": 0 of 0 "));
  if (!rows.length) return html`<${Empty}>Nothing is compared yet: a device counts once it has answered enough requests before and after.<//>`;
  return html`<${Table} label="Evidence" empty="" columns=${[{ name: "Finding" }, { name: "e", right: true }, { name: "stops at", right: true }, { name: "" }]}
    rows=${rows.map((row, index) => ({ key: index, cells: [row.text, number(Math.min(row.e, 1e9), 2), number(row.bound, 0), row.stops ? html`<${State} name="stops it" tone="bad"/>` : ""] }))}/>`;
}

const WAVES = "1, 10%, 100%";
/** Waves from text: numbers, percentages, or selectors in quotation marks. */
export function readWaves(text) {
  return text.split(/,(?![^(]*\))/).map((part) => part.trim()).filter(Boolean).map((part) => {
    if (/^\d+$/.test(part)) return { devices: Number(part) };
    if (/^[\d.]+ ?%$/.test(part)) return { percent: Number.parseFloat(part) };
    return { selector: part };
  });
}

export function NewRollout() {
  const releases = useData(() => get("/releases"), [], 60000);
  const artifacts = useData(() => get("/artifacts?limit=200"), [], 60000);
  const [form, setForm] = useState({ name: "", artifact: [], selector: "", waves: WAVES, bake: "5", windows: "", approval: false, stop: "revert" });
  const [plan, setPlan] = useState(null);
  const [error, setError] = useState(null);
  const put = (name, value) => { setPlan(null); setForm((before) => ({ ...before, [name]: value })); };
  const set = (name) => ({ target }) => put(name, target.type === "checkbox" ? target.checked : target.value);
  const choose = ({ target }) => put("artifact", [...target.selectedOptions].map((option) => option.value));
  const wanted = () => ({ rollout: form.name, spec: { selector: form.selector, artifacts: form.artifact, waves: readWaves(form.waves), bake_s: 60 * Number(form.bake), approval: form.approval, on_stop: form.stop, windows: form.windows.split(/ *[;\n] */).filter(Boolean) } });
  async function look(event) {
    event.preventDefault();
    setError(null);
    try { setPlan(await post("/rollouts/plan", wanted())); } catch (problem) { setPlan(null); setError(problem); }
  }
  async function start() {
    const made = await post("/rollouts", wanted());
    location.hash = `#/rollouts/${made.rollout}`;
  }
  const there = artifacts.data?.items.filter((one) => !one.withdrawn) ?? [];
  return html`<h1>New rollout</h1><form class="form" onSubmit=${look}>
      <label>Name <input required pattern="[a-z0-9][a-z0-9.\\-]*" maxlength="63" placeholder="phi-4-mini-november" value=${form.name} onInput=${set("name")}/></label>
      <label>Release, or artifacts of one model <select multiple required size="5" onChange=${choose}>
        ${(releases.data?.items ?? []).map((one) => html`<option value=${one.release}>release ${one.release}</option>`)}
        ${there.map((one) => html`<option value=${one.artifact}>${one.artifact}</option>`)}</select></label>
      ${artifacts.data && !there.length ? html`<${Empty}>There is no artifact yet: on the controller run <code>phifleet build --model MODEL --profile PROFILE</code>.<//>` : null}
      <label>Devices (a selector) <input required spellcheck="false" placeholder="label.site=lyon" value=${form.selector} onInput=${set("selector")}/></label>
      <label>Waves: numbers, percentages or selectors <input required value=${form.waves} onInput=${set("waves")}/></label>
      <label>Minutes to watch each wave <input type="number" min="0" step="any" required value=${form.bake} onInput=${set("bake")}/></label>
      <label>Order devices only then <input spellcheck="false" placeholder="at any time; mon-fri 22:00-05:00 Europe/Paris; sat,sun 00:00-00:00 Europe/Paris" value=${form.windows} onInput=${set("windows")}/></label>
      <label class="check"><input type="checkbox" checked=${form.approval} onChange=${set("approval")}/> A person approves each wave after the first</label>
      <label>If the gate stops it <select value=${form.stop} onChange=${set("stop")}><option value="revert">take changed devices back</option><option value="keep">leave them as they are</option></select></label>
      ${error && error.position !== null ? html`<pre class="problem" role="alert">${error.message}</pre>` : html`<${Problem} error=${error}/>`}
      <p class="buttons"><button type="submit" disabled=${!form.artifact.length}>Plan</button>
      ${plan && plan.devices ? html`<${Action} label="Start the rollout" what=${`Changes the model on ${plural(plan.devices, "device")} in ${plural(plan.waves.length, "wave")}, and stops by itself if inference gets worse.`} act=${start}/>` : null}</p></form>
    ${plan ? html`<h2>What it would do</h2><p>${plural(plan.devices, "device")} in ${plural(plan.waves.length, "wave")}.</p>
      <${Table} label="Plan" empty="" columns=${[{ name: "Wave" }, { name: "Devices by profile and variant" }, { name: "Slowdown that it can see" }, { name: "Bytes, at most", right: true }, { name: "Time to carry them", right: true }]}
        rows=${plan.waves.map((wave, index) => ({ key: index, cells: [`${index + 1}: ${wave.wave}`, Object.entries(wave.cohorts).map(([cohort, count]) => `${count} ${cohort}`).join("; ") || "none",
          Object.entries(wave.detectable).map(([cohort, share]) => `${cohort}: ${share === null ? "none, too few devices" : `${Math.round(100 * share)}% or more`}`).join("; "), bytes(wave.size_bytes), duration(wave.transfer_s)] }))}/>
      ${Object.keys(plan.unfit).length ? html`<h3>Devices that no variant fits</h3><ul>${Object.entries(plan.unfit).slice(0, 50).map(([device, why]) => html`<li>${device}: ${why}</li>`)}</ul>` : null}
      ${plan.taken.length ? html`<p>${plural(plan.taken.length, "device")} belong to another rollout now: ${plan.taken.slice(0, 20).join(", ")}</p>` : null}` : null}`;
}
