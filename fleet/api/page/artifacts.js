// Artifacts and releases: what each weighs, what it loses, how fast it is, and whether devices may run it.
import { at, call, get, post } from "./api.js";
import { Frontier } from "./charts.js";
import { Action, Problem, State, Table, Time, bytes, html, may, number, useData } from "./parts.js";

export function Artifacts({ me }) {
  const artifacts = useData(() => get("/artifacts?limit=500"), [], 30000);
  const releases = useData(() => get("/releases"), [], 30000);
  const items = artifacts.data?.items ?? [];
  const names = Object.fromEntries(items.map((one) => [one.digest, one.artifact]));
  return html`<h1>Artifacts</h1><${Problem} error=${artifacts.error}/><${Frontier} artifacts=${items}/>
    ${artifacts.data ? html`<${Table} label="Artifacts" empty="There is no artifact yet: on the controller run phifleet build --model MODEL --profile PROFILE."
      columns=${[{ name: "Artifact" }, { name: "Model" }, { name: "For" }, { name: "Size", right: true }, { name: "Loss (nats)", right: true }, { name: "ms a token", right: true }, { name: "Licence" }, { name: "Signed" }, { name: "" }]}
      rows=${items.map((one) => ({ key: one.digest, cells: [html`<span title=${one.digest}>${one.artifact}</span>`, one.model, `${one.profile}: ${one.toolchain} ${one.precision}`, bytes(one.size),
        one.quality ? html`<span title=${`${one.quality.evaluation}, ${one.quality.tokens} tokens`}>${number(one.quality.kl_divergence, 3)}</span>` : "not measured",
        one.speed ? html`<span title=${`on ${one.speed.machine}`}>${number(one.speed.tpot_ms)}</span>` : "-", one.license,
        html`<${State} name=${one.withdrawn ? "withdrawn" : one.published ? "published" : "not yet"}/>`,
        !may(me, "releaser") ? "" : one.withdrawn ? html`<${Action} label="Reinstate" what=${`Lets orders publish ${one.artifact} again.`} act=${() => call("POST", at`/artifacts/${one.digest}/reinstate`)}/>`
          : html`<${Action} label="Withdraw" danger what=${`Takes ${one.artifact} out of what is signed. Devices that run it go on; no order publishes it again.`} fields=${[{ name: "reason", label: "Why" }]} act=${({ reason }) => post(at`/artifacts/${one.digest}/withdraw`, { reason: reason || null })}/>`] }))}/>` : html`<p class="quiet">loading …</p>`}
    <h2>Releases</h2><${Problem} error=${releases.error}/>
    <${Table} label="Releases" empty="A release gives the variants of a model one name; each device gets the variant its profile is for." columns=${[{ name: "Release" }, { name: "Variants" }, { name: "Made" }, { name: "By" }, { name: "" }]}
      rows=${(releases.data?.items ?? []).map((one) => ({ key: one.release, cells: [one.release, one.digests.map((digest) => names[digest] ?? digest.slice(0, 12)).join(", "), html`<${Time} at=${one.created_at}/>`, one.created_by,
        may(me, "releaser") ? html`<${Action} label="Forget" danger what=${`Forgets the name ${one.release}; its artifacts stay.`} act=${() => call("DELETE", at`/releases/${one.release}`)}/>` : ""] }))}/>
    ${may(me, "releaser") ? html`<p class="buttons"><${Action} label="New release" what="Gives the variants of one model a name. It is never changed." fields=${[{ name: "release", label: "Name", required: true }, { name: "artifacts", label: "Artifacts, with commas between", required: true }]}
      act=${({ release, artifacts: text }) => post("/releases", { release, artifacts: text.split(",").map((one) => one.trim()).filter(Boolean) })}/></p>` : null}`;
}
