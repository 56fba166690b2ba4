// How machines become devices: tokens, and the machines that wait for an operator.
import { at, call, get, post } from "./api.js";
import { Action, Problem, State, Table, Time, html, may, useData, useState } from "./parts.js";

const HOURS = [["1", "an hour"], ["24", "a day"], ["168", "a week"], ["720", "30 days"]];

function labelsOf(text) {
  const found = {};
  for (const part of text.split(/[\s,]+/).filter(Boolean)) {
    const [name, ...value] = part.split("=");
    found[name] = value.join("=");
  }
  return found;
}

function Waiting() {
  const waiting = useData(() => get("/enrolments"), [], 5000);
  const decide = (device, what) => () => post(at`/enrolments/${device}/` + what);
  return html`<h2>Machines that wait</h2><${Problem} error=${waiting.error}/>
    <${Table} label="Machines that wait" empty="No machine waits. Those with a token that needs no operator become devices at once." columns=${[{ name: "Device" }, { name: "Profile" }, { name: "From" }, { name: "Asked" }, { name: "SHA-256 of its key" }, { name: "" }]}
      rows=${(waiting.data?.items ?? []).map((one) => ({ key: one.device, cells: [one.device, one.profile, one.address, html`<${Time} at=${one.asked_at}/>`, html`<code>${one.key.slice(0, 16)}</code>`,
        html`<span class="buttons"><${Action} label="Accept" what=${`The machine at ${one.address} becomes the device ${one.device} (${one.profile}).`} act=${decide(one.device, "accept")}/>
          <${Action} label="Reject" danger what=${`The machine at ${one.address} is refused. Its token has one use less.`} act=${decide(one.device, "reject")}/></span>`] }))}/>`;
}

function Ends() {
  const found = useData(() => get("/ends"), [], 60000);
  const items = found.data?.items ?? [], devices = found.data?.devices ?? [];
  return html`<h2>Certificates and metadata, and when they end</h2><${Problem} error=${found.error}/>
    <${Table} label="What ends when" empty="Nothing that this controller looks after has an end." columns=${[{ name: "What" }, { name: "Ends" }, { name: "" }, { name: "What to do" }]}
      rows=${items.map((one) => ({ key: one.name, cells: [one.text, html`<${Time} at=${one.expires_at}/>`, one.soon ? html`<${State} name="soon" tone="bad"/>` : "", one.hint] }))}/>
    <p class="quiet">Devices renew their certificates by themselves when two thirds of their time are over.</p>
    ${devices.length ? html`<${Table} label="Devices that have not renewed" empty="" columns=${[{ name: "Device that has not renewed" }, { name: "Ends" }]}
      rows=${devices.map((one) => ({ key: one.device, cells: [html`<a href=${`#/devices/${one.device}`}>${one.device}</a>`, html`<${Time} at=${one.expires_at}/>`] }))}/>` : null}`;
}

export function Enrolment({ me }) {
  const admin = may(me, "admin");
  const tokens = useData(() => (admin ? get("/enrolment-tokens") : Promise.resolve(null)), [], 10000);
  const profiles = useData(() => get("/profiles"), [], 60000);
  const [form, setForm] = useState({ profile: "", uses: "1", hours: "24", approval: false, labels: "" });
  const [made, setMade] = useState(null);
  const [error, setError] = useState(null);
  const set = (name) => ({ target }) => { const value = target.type === "checkbox" ? target.checked : target.value; setForm((before) => ({ ...before, [name]: value })); };
  const names = (profiles.data?.items ?? []).map((one) => one.name);
  async function create(event) {
    event.preventDefault();
    setError(null);
    try {
      setMade(await post("/enrolment-tokens", { profile: form.profile || names[0], uses: Number(form.uses), hours: Number(form.hours), approval: form.approval, labels: labelsOf(form.labels) }));
      tokens.reload();
    } catch (problem) { setError(problem); }
  }
  const good = (one) => (one.revoked_at ? html`<${State} name="revoked"/>` : html`<${Time} at=${one.expires_at}/>`);
  return html`<h1>Enrolment</h1>
    <p>A machine on which <code>phifleet-agent</code> is installed becomes a device with a token. It makes its key itself, and sends it to nobody.</p>
    <${Waiting}/>
    ${admin ? html`<h2>Tokens</h2><${Problem} error=${tokens.error}/>
    <${Table} label="Enrolment tokens" empty="No tokens yet." columns=${[{ name: "Profile" }, { name: "Used" }, { name: "Accepted by" }, { name: "Labels" }, { name: "Made" }, { name: "By" }, { name: "Good until" }, { name: "" }]}
      rows=${(tokens.data?.items ?? []).map((one) => ({ key: one.id, cells: [one.profile, `${one.used} of ${one.uses}`, one.approval ? "an operator" : "the token", Object.entries(one.labels).map(([name, value]) => `${name}=${value}`).join(", "), html`<${Time} at=${one.created_at}/>`, one.created_by, good(one),
        one.revoked_at ? "" : html`<${Action} label="Revoke" danger what=${`No machine becomes a device with this token from now on. Those that did stay devices.`} act=${() => call("DELETE", at`/enrolment-tokens/${one.id}`)}/>`] }))}/>
    <form class="form" onSubmit=${create}><h3>New enrolment token</h3>
      <label>Profile <select required value=${form.profile || names[0]} onInput=${set("profile")}>${names.map((name) => html`<option>${name}</option>`)}</select></label>
      <label>For how many devices <input type="number" required min="1" max="1000000" step="1" value=${form.uses} onInput=${set("uses")}/></label>
      <label>Good for <select value=${form.hours} onInput=${set("hours")}>${HOURS.map(([hours, text]) => html`<option value=${hours}>${text}</option>`)}</select></label>
      <label>Labels of each device <input value=${form.labels} placeholder="site=lyon line=3" onInput=${set("labels")}/></label>
      <label class="check"><input type="checkbox" checked=${form.approval} onInput=${set("approval")}/> An operator accepts each machine</label>
      <${Problem} error=${error ?? profiles.error}/><p class="buttons"><button type="submit" disabled=${!names.length}>Make a token</button></p>
      ${made ? html`<div class="note" role="status"><p>On the device, this once:</p><pre class="secret">phifleet-agent enrol --url ${location.origin} --token ${made.token}</pre></div>` : null}</form>` : null}
    <${Ends}/>`;
}
