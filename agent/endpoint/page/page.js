"use strict";

const $ = (id) => document.getElementById(id);
const turns = [];
let running = null;
let model = null;
let context = 0;
// The text of an answer that is being written.
let partial = "";
let thoughts = "";

const key = () => $("key").value.trim();
const headers = () => ({ "Content-Type": "application/json", ...(key() ? { Authorization: `Bearer ${key()}` } : {}) });

function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(2)} GB`;
  return bytes >= 1e6 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e3).toFixed(1)} kB`;
}

function list(target, pairs) {
  target.replaceChildren();
  for (const [name, value, title] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    if (title) dd.title = title;
    target.append(dt, dd);
  }
}

function show(props) {
  model = props.ready ? props.model : null;
  context = props.ready ? props.context : 0;
  $("state").className = props.ready ? "ready" : "down";
  $("state").textContent = props.ready ? `${props.model} on ${props.runtime}` : "no model serves now";
  $("turns").dataset.empty = props.ready
    ? `${props.model} runs on this device.\nNothing you write here leaves it.`
    : `No model serves now${props.reason ? `: ${props.reason}` : ""}.\nThis page looks again every few seconds.`;
  list($("loaded"), !props.ready ? [] : [
    ["Model", props.model],
    ["Runtime", `${props.runtime}, ${props.device}`],
    ["Context", `${props.context.toLocaleString()} tokens`],
    ["At once", `${props.capabilities.max_sequences} sequences`],
    ["Memory", size(props.memory_bytes)],
    ["Loaded in", `${props.load_s.toFixed(1)} s`],
  ]);
  $("temperature").placeholder = props.ready ? props.sampling_defaults.temperature : "";
  const quality = props.quality;
  list($("signed"), !props.quantization ? [] : [
    ["Precision", props.quantization.precision.toUpperCase()],
    ["Made by", props.quantization.toolchain],
    ["Size", size(props.quantization.size_bytes)],
    ["Loss (KL)", quality && quality.kl_divergence.toFixed(3), quality && `against FP32, on ${quality.evaluation}`],
    ["Perplexity", quality && `${quality.perplexity.toFixed(2)} (× ${quality.perplexity_ratio.toFixed(3)})`],
    ["Same top token", quality && `${(quality.same_top_token * 100).toFixed(1)} %`],
    ["Source", props.source.name],
    ["License", props.source.license],
    ["Digest", `${props.digest.slice(0, 16)}…`, props.digest],
  ]);
}

async function look() {
  try {
    const response = await fetch("props", { headers: headers() });
    if (response.status === 401) {
      $("key-label").hidden = false;
      $("state").className = "down";
      $("state").textContent = "a key is needed: give it under Settings";
      document.body.classList.add("facts");
    } else {
      show(await response.json());
    }
  } catch {
    $("state").className = "down";
    $("state").textContent = "the agent does not answer";
  }
}

function button(label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "plain";
  made.textContent = label;
  made.addEventListener("click", () => action(made));
  return made;
}

async function copy(text, shown) {
  const label = shown.textContent;
  shown.textContent = (await copied(text)) ? "Copied" : "Not copied";
  setTimeout(() => { shown.textContent = label; }, 1500);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no secure origin, or no permission: the older way needs a selection
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

function bubble(role, text) {
  const item = document.createElement("li");
  const body = document.createElement("div");
  item.className = `turn ${role}`;
  body.className = "body";
  if (role.startsWith("assistant")) body.append(markdown(text));
  else body.textContent = text;
  item.append(body);
  $("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function render(item, text) {
  const turns = $("turns");
  const stuck = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80;
  item.querySelector(".body").replaceChildren(markdown(text));
  if (stuck) item.scrollIntoView({ block: "end" });
}

// What the model thinks before it speaks, closed unless a person opens it; text, and nothing but text.
function think(item, thoughts) {
  if (!thoughts) return;
  let shown = item.querySelector(".thoughts");
  if (!shown) {
    shown = document.createElement("details");
    shown.className = "thoughts";
    shown.append(document.createElement("summary"), document.createElement("div"));
    shown.firstChild.textContent = "Thoughts";
    item.prepend(shown);
  }
  shown.lastChild.textContent = thoughts;
}

// The end of an answer: what can be copied, and why it is not whole.
function close(item, turn) {
  for (const code of item.querySelectorAll("pre")) {
    const text = code.textContent;
    code.append(button("Copy", (shown) => copy(text, shown)));
  }
  const foot = document.createElement("p");
  foot.className = "foot";
  if (turn.note) {
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = turn.note;
    foot.append(note);
  }
  foot.append(button("Copy", (shown) => copy(turn.content, shown)));
  item.append(foot);
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request() {
  const system = $("system").value.trim();
  const said = turns.map(({ role, content }) => ({ role, content }));
  const given = (name, id) => ($(id).value === "" ? {} : { [name]: Number($(id).value) });
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    stream: true,
    stream_options: { include_usage: true },
    // Without one the model's own setting holds, as for every client.
    ...given("temperature", "temperature"),
    ...given("max_tokens", "tokens"),
  };
}

async function answer(item) {
  running = new AbortController();
  const since = performance.now();
  let first = null;
  let count = 0;
  let usage = null;
  let reason = null;
  let drawing = null;
  const draw = () => { drawing = null; think(item, thoughts); render(item, partial); };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal: running.signal, body: JSON.stringify(request()),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of chunks(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const { content: text, reasoning_content: thought } = chunk.choices[0]?.delta ?? {};
      reason = chunk.choices[0]?.finish_reason ?? reason;
      if (text || thought) {
        first ??= performance.now();
        count += 1;
        partial += text ?? "";
        thoughts += thought ?? "";
        drawing ??= setTimeout(draw, 50);
      }
      usage = chunk.usage ?? usage;
      if (first) figures(usage?.completion_tokens ?? count, first - since, (performance.now() - first) / 1000);
    }
  } finally {
    clearTimeout(drawing);
    draw();
  }
  return reason === "length" ? cut(usage) : "";
}

function cut(usage) {
  const tokens = usage?.completion_tokens ?? 0;
  if (usage && context && usage.total_tokens >= context) {
    return `The answer was cut: the context of ${context} tokens is full. Begin a new conversation.`;
  }
  return `The answer was cut after ${tokens} tokens, the limit under Settings.`;
}

function figures(tokens, ttft, seconds) {
  const rate = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  $("figures").textContent = [rate, `first token after ${ttft.toFixed(0)} ms`, `${tokens} tokens`].filter(Boolean).join(" · ");
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("clear").disabled = on;
}

async function ask(text) {
  turns.push({ role: "user", content: text });
  bubble("user", text);
  const item = bubble("assistant waiting", "");
  let note = "";
  partial = thoughts = "";
  busy(true);
  try {
    note = await answer(item);
  } catch (error) {
    note = error.name === "AbortError" ? "You stopped this answer." : "The answer broke off.";
    if (error.name !== "AbortError") bubble("error", error.message);
  }
  item.classList.remove("waiting");
  if (partial || thoughts) {
    turns.push({ role: "assistant", content: partial, note, thoughts });
    close(item, turns.at(-1));
  } else { item.remove(); turns.pop(); }
  partial = thoughts = "";
  running = null;
  keep();
  busy(false);
  $("prompt").focus();
  look();
}

// A reload of the tab keeps the conversation; closing the tab forgets it.
function keep() {
  const said = partial || thoughts ? [...turns, { role: "assistant", content: partial, note: "The page was left.", thoughts }] : turns;
  try {
    sessionStorage.setItem("conversation", JSON.stringify({ turns: said, system: $("system").value }));
  } catch { /* no storage, or it is full: only a reload loses something */ }
}

function restore() {
  let kept;
  try {
    kept = JSON.parse(sessionStorage.getItem("conversation"));
  } catch {
    return;
  }
  if (!Array.isArray(kept?.turns)) return;
  $("system").value = kept.system ?? "";
  if (kept.turns.at(-1)?.role === "user") $("prompt").value = kept.turns.pop().content;
  for (const turn of kept.turns) {
    turns.push(turn);
    const item = bubble(turn.role, turn.content);
    if (turn.role === "assistant") { think(item, turn.thoughts); close(item, turn); }
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running || !model) return;
  $("prompt").value = "";
  $("prompt").style.height = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("prompt").addEventListener("input", () => {
  $("prompt").style.height = "";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  turns.length = 0;
  $("turns").replaceChildren();
  keep();
  $("figures").textContent = "\u00a0";
});
$("facts-button").addEventListener("click", () => {
  const open = document.body.classList.toggle("facts");
  $("facts-button").setAttribute("aria-expanded", open);
});
$("key").addEventListener("change", look);
$("system").addEventListener("change", keep);
addEventListener("pagehide", keep);

restore();
look();
setInterval(() => { if (!running) look(); }, 4000);
