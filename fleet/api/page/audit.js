// What was done, by whom; and whether the record is as it was written.
import { get } from "./api.js";
import { Problem, Table, Time, html, useData, useState } from "./parts.js";

export function Audit() {
  const { data, error } = useData(() => get("/audit/newest?limit=500"), []);
  const [text, setText] = useState("");
  const [head, setHead] = useState(null);
  const [problem, setProblem] = useState(null);
  async function verify() {
    setProblem(null);
    try { setHead(await get("/audit/head")); } catch (found) { setProblem(found); }
  }
  const wanted = text.trim().toLowerCase();
  const rows = (data?.items ?? []).filter((one) => !wanted || `${one.who} ${one.action} ${one.subject}`.toLowerCase().includes(wanted));
  return html`<h1>Audit</h1>
    <p class="buttons"><button type="button" onClick=${verify}>Verify the record</button></p><${Problem} error=${problem}/>
    ${head ? html`<p class=${head.broken.length ? "note bad" : "note"} role="status">${head.broken.length ? head.broken.join("; ") : `All ${head.entries} entries are as they were written.`}
      ${head.signed === null ? " No signed snapshot vouches for them yet." : ` The newest signed snapshot vouches for ${head.signed}.`}</p>` : null}
    <div class="search"><label>Filter the newest 500 <input type="search" value=${text} placeholder="rollout, or a name" onInput=${(event) => setText(event.target.value)}/></label></div><${Problem} error=${error}/>
    ${data ? html`<${Table} label="Audit" empty="No entry matches." columns=${[{ name: "When" }, { name: "Who" }, { name: "What" }, { name: "Of" }, { name: "Details" }]}
      rows=${rows.map((one) => ({ key: one.id, cells: [html`<${Time} at=${one.at}/>`, one.who, one.action, one.subject, html`<span class="details">${one.details ? JSON.stringify(one.details) : ""}</span>`] }))}/>` : null}`;
}
