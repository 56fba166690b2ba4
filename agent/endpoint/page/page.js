"use strict";

const $ = (id) => document.getElementById(id);
const turns = [];
let running = null;
let model = null;

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

function bubble(role, text) {
  const item = document.createElement("li");
  item.className = `turn ${role}`;
  item.textContent = text;
  $("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
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

async function answer(item) {
  running = new AbortController();
  const since = performance.now();
  let first = null;
  let count = 0;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal: running.signal,
    body: JSON.stringify({
      model,
      messages: turns,
      stream: true,
      stream_options: { include_usage: true },
      // Without one the model's own setting holds, as for every client.
      ...($("temperature").value === "" ? {} : { temperature: Number($("temperature").value) }),
      max_tokens: Number($("tokens").value),
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const chunk of chunks(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices[0]?.delta.content;
    if (text) {
      first ??= performance.now();
      count += 1;
      const stuck = $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 80;
      item.append(text);
      if (stuck) item.scrollIntoView({ block: "end" });
    }
    if (chunk.usage) count = chunk.usage.completion_tokens;
    if (first) figures(count, first - since, (performance.now() - first) / 1000);
  }
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
  busy(true);
  try {
    await answer(item);
  } catch (error) {
    if (error.name !== "AbortError") bubble("error", error.message);
  }
  item.classList.remove("waiting");
  if (item.textContent) turns.push({ role: "assistant", content: item.textContent });
  else { item.remove(); turns.pop(); }
  running = null;
  busy(false);
  $("prompt").focus();
  look();
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
  $("figures").textContent = "\u00a0";
});
$("facts-button").addEventListener("click", () => {
  const open = document.body.classList.toggle("facts");
  $("facts-button").setAttribute("aria-expanded", open);
});
$("key").addEventListener("change", look);

look();
setInterval(() => { if (!running) look(); }, 4000);
