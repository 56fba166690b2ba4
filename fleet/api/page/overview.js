// The fleet at a glance: who is there, how fast inference runs, and what a person should look at.
import { get } from "./api.js";
import { HeatMap } from "./charts.js";
import { Ago, Empty, Problem, Table, html, may, median, number, plural, quantile, useData, useMemo } from "./parts.js";

export function Overview({ me }) {
  const { data, error } = useData(() => get("/overview"), [], 10000, "overview");
  const groups = useMemo(() => (data ? byProfile(data) : []), [data]);
  if (!data) return error ? html`<${Problem} error=${error}/>` : html`<p class="quiet">loading …</p>`;
  if (!data.devices.length) {
    return html`<h1>Overview</h1><${Empty}>There is no device in this fleet yet. On the controller run
      <code>phifleet device add NAME --profile PROFILE --bundle NAME.json</code>, carry the bundle to the device, and start
      <code>phifleet-agent run --bundle NAME.json</code> there.<//>`;
  }
  const count = (name) => data.presence.filter((one) => one === name).length;
  const fresh = data.tpot_ms.filter((value, index) => value !== null && !data.stale[index]);
  return html`<h1>Overview</h1><${Problem} error=${error}/>
    <ul class="tiles">
      <li><b>${data.devices.length.toLocaleString()}</b> devices</li>
      <li><b>${count("online").toLocaleString()}</b> online</li>
      <li><b>${count("offline").toLocaleString()}</b> offline${count("unknown") ? `, ${count("unknown")} unknown` : ""}</li>
      <li><b>${number(median(fresh))} ms</b> a token, median</li>
      <li class=${data.attention_count ? "bad" : ""}><b>${data.attention_count.toLocaleString()}</b> to look at</li>
    </ul>
    <h2>Time per token</h2><${HeatMap} overview=${data}/>
    <${Table} label="Inference by profile and model" empty="No device reports yet." columns=${[{ name: "Profile" }, { name: "Artifact" }, { name: "Devices", right: true }, { name: "ms a token, median", right: true }, { name: "p95", right: true }, { name: "ms to first token", right: true }, { name: "Newest report", right: true }]}
      rows=${groups.map((one) => ({ key: one.key, cells: [html`<a href=${`#/devices?selector=${encodeURIComponent(`profile=${one.profile}`)}`}>${one.profile}</a>`, one.artifact || "nothing served", one.devices, number(one.tpot), number(one.p95), number(one.ttft, 0), html`<${Ago} seconds=${one.age}/>`] }))}/>
    <h2>What needs attention</h2>
    ${data.attention.length ? html`<ul class="attention">${data.attention.slice(0, 50).map((entry) => html`<li><a href=${entry.rollout ? `#/rollouts/${entry.rollout}` : entry.device ? `#/devices/${entry.device}` : "#/enrolment"}>${entry.text}</a> ${entry.age_s == null ? null : html`<${Ago} seconds=${entry.age_s}/>`}</li>`)}</ul>
      ${data.attention_count > 50 ? html`<p class="quiet">and ${plural(data.attention_count - 50, "more entry").replace("entrys", "entries")}</p>` : null}` : html`<${Empty}>Nothing. ${may(me, "releaser") ? html`<a href="#/rollouts/new">Start a rollout</a>` : ""}<//>`}`;
}

function byProfile(data) {
  const groups = new Map();
  data.devices.forEach((_, index) => {
    const profile = data.profiles[data.profile[index]], artifact = data.artifacts[data.artifact[index]];
    const key = `${profile} ${artifact}`;
    const group = groups.get(key) ?? { key, profile, artifact, devices: 0, tpots: [], ttfts: [], age: null };
    groups.set(key, group);
    group.devices += 1;
    const age = data.health_age_s[index];
    if (age !== null && (group.age === null || age < group.age)) group.age = age;
    if (!data.stale[index]) {
      if (data.tpot_ms[index] !== null) group.tpots.push(data.tpot_ms[index]);
      if (data.ttft_ms[index] !== null) group.ttfts.push(data.ttft_ms[index]);
    }
  });
  return [...groups.values()].map((group) => ({ ...group, tpot: median(group.tpots), p95: quantile(group.tpots, 0.95), ttft: median(group.ttfts) }))
    .sort((a, b) => a.key.localeCompare(b.key));
}
