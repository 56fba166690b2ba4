// Who may use the API, and whom it tells.
import { at, call, get, post } from "./api.js";
import { Action, Problem, State, Table, Time, html, useData, useState } from "./parts.js";

export function Access() {
  const tokens = useData(() => get("/tokens"), [], 30000);
  const webhooks = useData(() => get("/webhooks"), [], 30000);
  const [form, setForm] = useState({ name: "", role: "viewer", scope: "", days: "" });
  const [made, setMade] = useState(null);
  const [error, setError] = useState(null);
  const set = (name) => ({ target }) => { const { value } = target; setForm((before) => ({ ...before, [name]: value })); };
  async function create(event) {
    event.preventDefault();
    setError(null);
    const expires = form.days ? new Date(Date.now() + 86400000 * Number(form.days)).toISOString() : null;
    try {
      setMade(await post("/tokens", { name: form.name, role: form.role, scope: form.scope || null, expires_at: expires }));
      tokens.reload();
    } catch (problem) { setError(problem); }
  }
  const [hook, setHook] = useState({ url: "", events: "*" });
  const [hooked, setHooked] = useState(null);
  const [refused, setRefused] = useState(null);
  const put = (name) => ({ target }) => { const { value } = target; setHook((before) => ({ ...before, [name]: value })); };
  async function tell(event) {
    event.preventDefault();
    setRefused(null);
    try {
      setHooked(await post("/webhooks", { url: hook.url, events: hook.events.split(",").map((one) => one.trim()).filter(Boolean) }));
      webhooks.reload();
    } catch (problem) { setRefused(problem); }
  }
  const until = (one) => (one.revoked_at ? html`<${State} name="revoked"/>` : one.expires_at ? html`<${Time} at=${one.expires_at}/>` : "it is revoked");
  return html`<h1>Access</h1><h2>Tokens</h2><${Problem} error=${tokens.error}/>
    <${Table} label="Tokens" empty="" columns=${[{ name: "Name" }, { name: "Role" }, { name: "Devices" }, { name: "Made" }, { name: "By" }, { name: "Used" }, { name: "Good until" }, { name: "" }]}
      rows=${(tokens.data?.items ?? []).map((one) => ({ key: one.id, cells: [one.name, one.role, one.scope ?? "all", html`<${Time} at=${one.created_at}/>`, one.created_by, html`<${Time} at=${one.used_at}/>`, until(one),
        one.revoked_at ? "" : html`<${Action} label="Revoke" danger what=${`Whoever uses the token ${one.name} is refused from now on. It changes no device.`} act=${() => call("DELETE", at`/tokens/${one.id}`)}/>`] }))}/>
    <form class="form" onSubmit=${create}><h3>New token</h3>
      <label>Name <input required maxlength="63" value=${form.name} onInput=${set("name")}/></label>
      <label>Role <select value=${form.role} onChange=${set("role")}>${["viewer", "operator", "releaser", "admin"].map((role) => html`<option>${role}</option>`)}</select></label>
      <label>Only devices of this selector <input value=${form.scope} placeholder="all devices" onInput=${set("scope")}/></label>
      <label>Good for days <input type="number" min="0" step="any" value=${form.days} placeholder="until it is revoked" onInput=${set("days")}/></label>
      <${Problem} error=${error}/><p class="buttons"><button type="submit">Make a token</button></p>
      ${made ? html`<p class="note" role="status">The token ${made.name}, shown this once: <code class="secret">${made.token}</code></p>` : null}</form>
    <h2>Webhooks</h2><${Problem} error=${webhooks.error}/>
    <${Table} label="Webhooks" empty="No other program is told what happens." columns=${[{ name: "URL" }, { name: "Events" }, { name: "Delivered" }, { name: "Error" }, { name: "" }]}
      rows=${(webhooks.data?.items ?? []).map((one) => ({ key: one.id, cells: [one.url, one.events.join(", "), html`<${Time} at=${one.delivered_at}/>`, one.error ?? "", html`<${Action} label="Delete" danger what=${`Sends ${one.url} nothing more.`} act=${() => call("DELETE", at`/webhooks/${one.id}`)}/>`] }))}/>
    <form class="form" onSubmit=${tell}><h3>New webhook</h3>
      <label>URL <input type="url" required maxlength="2000" placeholder="where it listens" value=${hook.url} onInput=${put("url")}/></label>
      <label>Events, with commas between <input required value=${hook.events} placeholder="rollout.*, device.revoke" onInput=${put("events")}/></label>
      <${Problem} error=${refused}/><p class="buttons"><button type="submit">Make a webhook</button></p>
      ${hooked ? html`<p class="note" role="status">The secret of the signatures to ${hooked.url}, shown this once: <code class="secret">${hooked.secret}</code></p>` : null}</form>`;
}
