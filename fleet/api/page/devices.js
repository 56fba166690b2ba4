// Devices by selector, and one device: its facts, its history, its figures over time, and what can be done to it.
import { at, call, get, post } from "./api.js";
import { Line } from "./charts.js";
import { Action, Ago, Problem, State, Table, Time, bytes, html, may, number, plural, useData, useMemo, usePages, useState } from "./parts.js";

export function Devices({ me, query }) {
  const selector = query.get("selector") ?? "";
  const [text, setText] = useState(selector);
  const { data, error, turn } = usePages((after) => {
    const asked = new URLSearchParams({ limit: "100" });
    if (selector) asked.set("selector", selector);
    if (after) asked.set("after", after);
    return get(`/devices?${asked}`);
  }, [selector]);
  function search(event) {
    event.preventDefault();
    location.hash = text.trim() ? `#/devices?selector=${encodeURIComponent(text.trim())}` : "#/devices";
  }
  const labels = async ({ label }) => {
    const [name, ...rest] = label.split("=");
    const asked = { labels: { [rest.length ? name.trim() : name.trim().replace(/-$/, "")]: rest.length ? rest.join("=").trim() : null } };
    await post("/labels", { ...asked, selector: selector || "has profile" });
  };
  const shown = error ? [] : data?.items ?? [];
  return html`<h1>Devices</h1>
    <form class="search" onSubmit=${search}><label>Selector
      <input type="search" value=${text} spellcheck="false" placeholder="profile=pi-5 and label.site in (lyon, turin) and presence=online" onInput=${(event) => setText(event.target.value)}/></label>
      <button type="submit">Show</button></form>
    ${error && error.position !== null ? html`<pre class="problem" role="alert">${error.message}</pre>` : html`<${Problem} error=${error}/>`}
    ${!data && !error ? html`<p class="quiet">loading …</p>` : html`<${Table} label="Devices" empty=${selector ? "No device is meant by this selector." : "There is no device in this fleet yet: phifleet device add NAME --profile PROFILE makes one."}
      columns=${[{ name: "Device" }, { name: "Profile" }, { name: "Presence" }, { name: "Serves" }, { name: "Order" }, { name: "Labels" }, { name: "Last seen", right: true }]}
      rows=${shown.map((one) => ({ key: one.device, cells: [html`<a href=${`#/devices/${one.device}`}>${one.device}</a>`, one.profile,
        html`<${State} name=${one.revoked_at ? "revoked" : one.presence}/>`, one.deployment?.artifact ?? "-", one.deployment ? html`<${State} name=${one.deployment.state}/>` : "-",
        Object.entries(one.labels).map(([name, value]) => `${name}=${value}`).join(", "), html`<${Ago} seconds=${one.last_seen_age_s}/>`] }))}/>`}
    ${turn}
    ${may(me, "operator") && shown.length ? html`<p class="buttons"><${Action} label="Label these devices" what=${selector ? `Sets a label of every device that "${selector}" means.` : "Sets a label of every device of the fleet."}
      fields=${[{ name: "label", label: "NAME=VALUE, or NAME- to remove it", required: true }]} act=${labels}/></p>` : null}`;
}

export function Device({ me, name }) {
  const device = useData(() => get(at`/devices/${name}`), [name], 5000);
  const history = useData(() => get(at`/devices/${name}/deployments?limit=50`), [name]);
  const health = useData(() => get(at`/devices/${name}/health?limit=500`), [name]);
  const series = useMemo(() => {
    const rows = [...(health.data?.items ?? [])].reverse();
    const column = (field, scale = 1) => rows.map((row) => (row[field] === null ? null : row[field] * scale));
    return { times: rows.map((row) => Date.parse(row.at) / 1000), tpot: column("tpot_ms_p50"), ttft: column("ttft_ms_p50"),
      speed: column("tokens_per_s"), memory: column("memory_bytes", 1e-6), heat: column("temperature_c") };
  }, [health.data]);
  const one = device.data;
  if (!one) return html`<h1>${name}</h1><${Problem} error=${device.error}/>`;
  const facts = one.facts ?? {}, proof = one.deployment?.proof;
  const act = (path) => () => post(path, { devices: [name] });
  return html`<h1>${one.device}</h1><${Problem} error=${device.error}/>
    <dl class="facts">
      <dt>Presence</dt><dd><${State} name=${one.revoked_at ? "revoked" : one.presence}/> <${Ago} seconds=${one.last_seen_age_s}/></dd>
      <dt>Profile</dt><dd>${one.profile}</dd><dt>Agent</dt><dd>${one.agent_version || "never seen"}</dd>
      <dt>Labels</dt><dd>${Object.entries(one.labels).map(([key, value]) => `${key}=${value}`).join(", ") || "none"}</dd>
      <dt>Serves</dt><dd>${one.reported?.artifact || "nothing"}${one.deployment?.runtime ? ` by ${one.deployment.runtime}` : ""}</dd>
      <dt>Endpoint</dt><dd>${one.deployment?.endpoint ?? "-"}</dd>
      <dt>Machine</dt><dd>${[facts.machine, facts.cpu_count ? plural(facts.cpu_count, "CPU") : null, facts.memory_total_bytes ? bytes(facts.memory_total_bytes) : null].filter(Boolean).join(", ") || "not reported"}</dd>
      <dt>Runtimes</dt><dd>${(facts.runtimes ?? []).map((one) => (one.usable ? `${one.name} ${one.version}` : `${one.name} (not usable: ${one.reason})`)).join(", ") || "not reported"}</dd>
      ${proof ? html`<dt>Proof</dt><dd>${number(proof.ttft_ms, 0)} ms to the first token, ${number(proof.tpot_ms)} ms a token${Number.isFinite(proof.device_share) ? `, ${number(100 * proof.device_share, 0)}% of the model on ${proof.device}` : ""}</dd>` : null}
      ${one.cloned_at ? html`<dt>Identity</dt><dd class="bad">speaks from two machines, last <${Time} at=${one.cloned_at}/></dd>` : null}
    </dl>
    <p class="buttons">
      ${may(me, "releaser") ? html`<${Action} label="Order an artifact" what="Orders this 1 device to run an artifact or a release." fields=${[{ name: "artifact", label: "Artifact or release", required: true }]} act=${({ artifact }) => post("/deployments", { artifacts: [artifact], devices: [name] })}/>` : null}
      ${may(me, "operator") && one.deployment ? html`<${Action} label="Cancel the order" what="Withdraws the order of this 1 device, or sends it back to what it serves." act=${act("/deployments/cancel")}/>
        <${Action} label="Roll back" danger what="Orders this 1 device to run what it committed to before." act=${act("/deployments/rollback")}/>` : null}
      ${may(me, "admin") && !one.revoked_at ? html`<${Action} label="Revoke" danger what=${`Voids the certificates of this 1 device, cancels its order and bars it. It cannot be undone.`} act=${() => call("POST", at`/devices/${name}/revoke`)}/>` : null}
    </p>
    <h2>Inference over time ${one.health_age_s === null ? null : html`<${Ago} seconds=${one.health_age_s}/>`} ${one.health_stale ? html`<${State} name="not fresh" tone="wait"/>` : null}</h2>
    <div class="lines">
      <${Line} label="Time per token" unit="ms" times=${series.times} values=${series.tpot}/><${Line} label="Time to first token" unit="ms" times=${series.times} values=${series.ttft}/>
      <${Line} label="Speed" unit="tokens/s" times=${series.times} values=${series.speed}/><${Line} label="Memory" unit="MB" times=${series.times} values=${series.memory}/>
      <${Line} label="Temperature" unit="°C" times=${series.times} values=${series.heat}/></div>
    <h2>Orders</h2><${Problem} error=${history.error}/>
    <${Table} label="Orders" empty="This device was never ordered to run anything." columns=${[{ name: "Made" }, { name: "Artifact" }, { name: "State" }, { name: "Why" }]}
      rows=${(history.data?.items ?? []).map((row) => ({ key: row.deployment, cells: [html`<${Time} at=${row.created_at}/>`, row.artifact, html`<${State} name=${row.state}/>`,
        row.failure ?? row.waiting ? html`${(row.failure ?? row.waiting).message} <code>${(row.failure ?? row.waiting).code}</code>` : row.publish_error ?? ""] }))}/>`;
}
