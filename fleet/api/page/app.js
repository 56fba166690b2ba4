// Sign-in, navigation, and the state of the controller, around the pages.
import { call, follow, get, token } from "./api.js";
import { Access } from "./access.js";
import { Artifacts } from "./artifacts.js";
import { Audit } from "./audit.js";
import { Device, Devices } from "./devices.js";
import { Enrolment } from "./enrolment.js";
import { Overview } from "./overview.js";
import { NewRollout, Rollout, Rollouts } from "./rollouts.js";
import { Problem, announce, forget, html, may, render, useData, useEffect, useRef, useState } from "./parts.js";

const PAGES = [["overview", "Overview", "viewer"], ["devices", "Devices", "viewer"], ["artifacts", "Artifacts", "viewer"], ["rollouts", "Rollouts", "viewer"], ["enrolment", "Enrolment", "operator"], ["access", "Access", "admin"], ["audit", "Audit", "admin"]];

// Pages of these roles are about the whole fleet, which a token with a scope does not see.
const WHOLE = new Set(["operator", "admin"]);

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/");
  let name = rest.join("/");
  try { name = decodeURIComponent(name); } catch { /* shown as it is */ }
  return { page: page || "overview", name, query: new URLSearchParams(query ?? ""), key: location.hash };
}

function SignIn({ problem, signedIn }) {
  const [text, setText] = useState("");
  const [error, setError] = useState(problem);
  async function submit(event) {
    event.preventDefault();
    token.set(text.trim());
    try { signedIn(await get("/me")); } catch (found) { token.clear(); setError(found); }
  }
  return html`<main class="sign-in"><form class="form" onSubmit=${submit}><h1>phifleet</h1>
    <p>Sign in with a token of the API, or open the link that <code>phifleet dashboard</code> prints on the controller.</p>
    <label>Token <input type="password" required autocomplete="off" value=${text} onInput=${(event) => setText(event.target.value)}/></label>
    <${Problem} error=${error}/><p class="buttons"><button type="submit">Sign in</button></p></form></main>`;
}

function Controller({ me }) {
  const { data, error } = useData(() => (me.scope ? Promise.resolve(null) : get("/status")), [], 5000);
  const trouble = error ? (error.code === "unreachable" ? "The controller's API does not answer: what is shown is the past." : error.code === "database" ? "The controller cannot use its database: what is shown is the past." : error.message)
    : data && !data.controller_running ? "No controller runs: what is shown is the past. Start phifleet serve."
    : data && !data.controllers.some((one) => one.broker_connected) ? `The controller has lost its broker: ${data.controllers[0]?.broker_error ?? "it does not answer"}. Devices cannot be reached.` : null;
  return trouble ? html`<p class="trouble" role="alert">${trouble}</p>` : null;
}

function App() {
  const [me, setMe] = useState(null);
  const [ready, setReady] = useState(false);
  const [problem, setProblem] = useState(null);
  const [where, setWhere] = useState(place());
  const [live, setLive] = useState(false);
  const main = useRef(null);
  useEffect(() => {
    const moved = () => { setWhere(place()); main.current?.focus({ preventScroll: false }); };
    addEventListener("hashchange", moved);
    (async () => {
      const code = /^#sign-in=(.+)$/.exec(location.hash)?.[1];
      try {
        if (code) {
          history.replaceState(null, "", location.pathname);  // the code is neither kept nor sent anywhere else
          setWhere(place());
          token.set((await call("POST", "/sign-in", { code })).token);
        }
        if (token.get()) setMe(await get("/me"));
      } catch (error) {
        if (error.status === 401) token.clear();
        setProblem(error);
      }
      setReady(true);
    })();
    return () => removeEventListener("hashchange", moved);
  }, []);
  useEffect(() => (me && !me.scope ? follow(announce, setLive) : undefined), [me]);
  useEffect(() => {
    const title = PAGES.find(([id]) => id === where.page)?.[1] ?? "";
    document.title = `${where.name || title} - phifleet`;
  }, [where.key]);
  if (!ready) return null;
  if (!me) return html`<${SignIn} problem=${problem} signedIn=${setMe}/>`;
  const leave = () => { token.clear(); forget(); setProblem(null); setMe(null); };
  const shown = PAGES.filter(([, , role]) => may(me, role) && (!WHOLE.has(role) || !me.scope));
  return html`<a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the page</a>
    <header><img src="static/icon.svg" alt="" width="26" height="26"/><b>phifleet</b>
      <nav aria-label="Pages">${shown.map(([id, title]) => html`<a href=${`#/${id}`} aria-current=${where.page === id ? "page" : undefined}>${title}</a>`)}</nav>
      <span class="who">${me.role}${me.scope ? `, ${me.scope}` : ""} <span class=${live ? "live on" : "live"} title=${live ? "Changes are shown as they happen" : "Read again every few seconds"}>${live ? "live" : "every 10 s"}</span>
        <button type="button" class="plain" onClick=${leave}>Sign out</button></span></header>
    <${Controller} me=${me}/>
    <main id="main" ref=${main} tabindex="-1"><${Page} key=${where.page + where.name} me=${me} where=${where} pages=${shown}/></main>`;
}

function Page({ me, where, pages }) {
  const { page, name, query } = where;
  if (!pages.some(([id]) => id === page)) return html`<h1>There is no such page</h1><p>Or your role does not show it. <a href="#/overview">Overview</a></p>`;
  if (page === "devices") return name ? html`<${Device} me=${me} name=${name}/>` : html`<${Devices} key=${where.key} me=${me} query=${query}/>`;
  if (page === "rollouts") return name === "new" ? html`<${NewRollout}/>` : name ? html`<${Rollout} me=${me} name=${name}/>` : html`<${Rollouts} me=${me}/>`;
  if (page === "artifacts") return html`<${Artifacts} me=${me}/>`;
  if (page === "enrolment") return html`<${Enrolment} me=${me}/>`;
  if (page === "access") return html`<${Access}/>`;
  if (page === "audit") return html`<${Audit}/>`;
  return html`<${Overview} me=${me}/>`;
}

render(html`<${App}/>`, document.getElementById("app"));
