// The API, and nothing but the API: every page reads and changes the fleet through these functions.

const KEY = "phifleet-token";

/** An error as the API has it: `code` is stable, `message` is for people. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `status ${status}`);
    this.status = status;
    this.code = body.code || "unknown";
    this.position = body.position ?? null;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

let leaving = null;
/** What `load` asks for before it waits for anything is given up when `signal` says so: nobody reads the answer. */
export function within(signal, load) {
  leaving = signal;
  try { return load(); } finally { leaving = null; }
}

/** Ask the API; returns the JSON of the answer, and throws a Problem for an error. */
export async function call(method, path, body, headers = {}) {
  const sent = { ...headers };
  if (token.get()) sent.Authorization = `Bearer ${token.get()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(`/api/v1${path}`, {
      method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
      signal: method === "GET" ? leaving : null,
    });
  } catch {
    throw new Problem(0, { code: "unreachable", detail: "The controller does not answer." });
  }
  const text = await response.text();
  let read = {};
  try { read = text ? JSON.parse(text) : {}; } catch { read = { detail: "The answer is not JSON." }; }
  if (!response.ok) throw new Problem(response.status, read);
  return read;
}

export const get = (path) => call("GET", path);
/** POST once: an answer that was lost on the way is asked for again with the same key and done once. */
export async function post(path, body) {
  const headers = { "Idempotency-Key": crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2) };
  try {
    return await call("POST", path, body, headers);
  } catch (error) {
    if (error.code !== "unreachable") throw error;
    return call("POST", path, body, headers);
  }
}

export const at = (parts, ...values) =>
  parts.reduce((path, part, index) => path + part + (index < values.length ? encodeURIComponent(values[index]) : ""), "");

/** Follow the audit. `heard(entry)` for each, `connected(boolean)` when the stream comes and goes; returns `stop`. */
export function follow(heard, connected) {
  const ends = new AbortController();
  (async () => {
    let last = null;
    while (!ends.signal.aborted) {
      try {
        const headers = { Authorization: `Bearer ${token.get()}` };
        if (last !== null) headers["Last-Event-ID"] = last;
        const response = await fetch("/api/v1/events", { headers, signal: ends.signal, cache: "no-store" });
        if (response.status === 401 || response.status === 403) return;
        if (!response.ok) throw new Error(String(response.status));
        connected(true);
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let kept = "";
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          const blocks = (kept + value).split("\n\n");
          kept = blocks.pop();
          for (const block of blocks) {
            const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s).slice(0, 2)));
            if (fields.id) { last = fields.id; heard(JSON.parse(fields.data)); }
          }
        }
      } catch {
        if (ends.signal.aborted) return;
      }
      connected(false);
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  })();
  return () => ends.abort();
}
