// Artifacts and releases: what each weighs, what it loses, how fast it is, and whether devices may run it.
import { at, call, get, post } from "./api.js";
import { Frontier } from "./charts.js";
import { Action, Problem, State, Table, Time, bytes, html, may, number, plural, useData, useState } from "./parts.js";

/** Artifacts that were built elsewhere and carried here. */
function Imports() {
  const { data, error, reload } = useData(() => get("/imports"), [], 30000);
  if (!data) return html`<${Problem} error=${error}/>`;
  const state = (one) => (one.problem ? html`<span class="bad">${one.problem}</span>` : one.there ? html`<${State} name="here already" tone="good"/>`
    : html`<${Action} label="Import" what=${`Takes ${one.artifact} (${bytes(one.size)}) into this controller's store, and compares every byte with its manifest. It changes no device.`} act=${async () => { await post("/imports", { name: one.name }); reload(); }}/>`);
  return html`<h2>Built elsewhere</h2><${Problem} error=${error}/>
    <${Table} label="Artifacts that were built elsewhere" empty=${html`To bring an artifact from another machine, run <code>phifleet artifacts export ARTIFACT FOLDER</code> there, and copy FOLDER into <code>${data.folder}</code> on the controller.`}
      columns=${[{ name: "Folder" }, { name: "Artifact" }, { name: "Model" }, { name: "Size", right: true }, { name: "" }]}
      rows=${data.items.map((one) => ({ key: one.name, cells: [one.name, one.artifact ?? "-", one.model ?? "-", one.size === null ? "-" : bytes(one.size), state(one)] }))}/>`;
}

/** Which devices a release would give which variant now. */
function Variants({ release }) {
  const [plan, setPlan] = useState(null);
  const [error, setError] = useState(null);
  async function look() {
    setError(null);
    try {
      setPlan(await post("/rollouts/plan", { rollout: "who-gets-which", spec: { selector: "has profile", artifacts: [release], waves: [{ percent: 100 }] } }));
    } catch (problem) { setPlan(null); setError(problem); }
  }
  if (error) return html`<${Problem} error=${error}/>`;
  if (!plan) return html`<button type="button" class="plain" onClick=${look}>Who gets which</button>`;
  const unfit = Object.entries(plan.unfit);
  return html`<div role="status"><ul class="variants">${Object.entries(plan.waves[0].cohorts).map(([cohort, count]) => html`<li>${plural(count, "device")}: ${cohort}</li>`)}
    ${plan.devices ? null : html`<li>no device would change</li>`}
    ${plan.taken.length ? html`<li>${plural(plan.taken.length, "device")} in another rollout</li>` : null}
    ${unfit.length ? html`<li class="bad" title=${unfit.slice(0, 10).map(([device, why]) => `${device}: ${why}`).join("\n")}>no variant fits ${plural(unfit.length, "device")}: ${unfit.slice(0, 3).map(([device]) => device).join(", ")}${unfit.length > 3 ? " …" : ""}</li>` : null}</ul></div>`;
}

export function Artifacts({ me }) {
  const artifacts = useData(() => get("/artifacts?limit=500"), [], 30000, "artifacts");
  const releases = useData(() => get("/releases"), [], 30000, "releases");
  const items = artifacts.data?.items ?? [];
  const names = Object.fromEntries(items.map((one) => [one.digest, one.artifact]));
  return html`<h1>Artifacts</h1><${Problem} error=${artifacts.error}/><${Frontier} artifacts=${items}/>
    ${artifacts.data ? html`<${Table} label="Artifacts" empty=${html`There is no artifact yet. On the controller run <code>phifleet build --model MODEL --profile PROFILE</code>, or import one that was built elsewhere.`}
      columns=${[{ name: "Artifact" }, { name: "Model" }, { name: "For" }, { name: "Size", right: true }, { name: "Loss (nats)", right: true }, { name: "on foreign text", right: true }, { name: "ms a token", right: true }, { name: "Licence" }, { name: "Signed" }, { name: "" }]}
      rows=${items.map((one) => ({ key: one.digest, cells: [html`<span title=${one.digest}>${one.artifact}</span>`, one.model, `${one.profile}: ${one.toolchain} ${one.precision}`, bytes(one.size),
        one.quality ? html`<span title=${`${one.quality.evaluation}, ${one.quality.tokens} tokens`}>${number(one.quality.kl_divergence, 3)}</span>` : "not measured", number(one.foreign?.kl_divergence, 3),
        one.speed ? html`<span title=${`on ${one.speed.machine}`}>${number(one.speed.tpot_ms)}</span>` : "-", one.license,
        html`<${State} name=${one.withdrawn ? "withdrawn" : one.published ? "published" : "not yet"}/>`,
        !may(me, "releaser") ? "" : one.withdrawn ? html`<${Action} label="Reinstate" what=${`Lets orders publish ${one.artifact} again.`} act=${() => call("POST", at`/artifacts/${one.digest}/reinstate`)}/>`
          : html`<${Action} label="Withdraw" danger what=${`Takes ${one.artifact} out of what is signed. Devices that run it go on; no order publishes it again.`} fields=${[{ name: "reason", label: "Why" }]} act=${({ reason }) => post(at`/artifacts/${one.digest}/withdraw`, { reason: reason || null })}/>`] }))}/>` : html`<p class="quiet">loading …</p>`}
    ${may(me, "releaser") && !me.scope ? html`<${Imports}/>` : null}
    <h2>Releases</h2><${Problem} error=${releases.error}/>
    <${Table} label="Releases" empty="A release gives the variants of a model one name; each device gets the variant its profile is for." columns=${[{ name: "Release" }, { name: "Variants" }, { name: "Made" }, { name: "By" }, { name: "Devices now" }, { name: "" }]}
      rows=${(releases.data?.items ?? []).map((one) => ({ key: one.release, cells: [one.release, one.digests.map((digest) => names[digest] ?? digest.slice(0, 12)).join(", "), html`<${Time} at=${one.created_at}/>`, one.created_by, may(me, "releaser") ? html`<${Variants} release=${one.release}/>` : "",
        may(me, "releaser") ? html`<${Action} label="Forget" danger what=${`Forgets the name ${one.release}; its artifacts stay.`} act=${() => call("DELETE", at`/releases/${one.release}`)}/>` : ""] }))}/>
    ${may(me, "releaser") ? html`<p class="buttons"><${Action} label="New release" what="Gives the variants of one model a name. It is never changed." fields=${[{ name: "release", label: "Name", required: true }, { name: "artifacts", label: "Artifacts, with commas between", required: true }]}
      act=${({ release, artifacts: text }) => post("/releases", { release, artifacts: text.split(",").map((one) => one.trim()).filter(Boolean) })}/></p>` : null}`;
}
