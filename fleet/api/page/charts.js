// The heat map of the fleet on a canvas, and lines over time.
import { bytes, html, quantile, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./parts.js";

// Cold to hot in steps, as a canvas keeps a pixel (red is the lowest byte).
const COLD = [38, 120, 178], HOT = [205, 62, 40], STEPS = 64;
const pixel = ([red, green, blue]) => 0xff000000 + blue * 65536 + green * 256 + red;
const GREY = pixel([142, 153, 159]);
const COLOURS = Uint32Array.from({ length: STEPS }, (_, step) =>
  pixel(COLD.map((value, index) => Math.round(value + ((HOT[index] - value) * step) / (STEPS - 1)))));

/** One cell a device, by profile; blue is fast, red is slow, grey has no fresh figure. */
export function HeatMap({ overview }) {
  const canvas = useRef(null);
  const layout = useRef({ side: 1, columns: 1, order: [] });
  const [width, setWidth] = useState(800);
  const [said, setSaid] = useState("");
  useLayoutEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(200, Math.floor(entry.contentRect.width))));
    watch.observe(canvas.current.parentElement);
    return () => watch.disconnect();
  }, []);
  const [some, low, high] = useMemo(() => {
    const fresh = overview.tpot_ms.filter((value, index) => value !== null && !overview.stale[index]);
    return [fresh.length > 0, quantile(fresh, 0.05), quantile(fresh, 0.95)];
  }, [overview]);
  // Pixels by hand: 10,000 rectangles cost a canvas more than the page may keep a person waiting.
  useEffect(() => {
    const count = overview.devices.length || 1, scale = window.devicePixelRatio || 1;
    const side = Math.round(Math.max(3, Math.min(22, Math.floor(Math.sqrt((width * 260) / count)))) * scale);
    const columns = Math.max(1, Math.floor((width * scale) / side)), rows = Math.ceil(count / columns);
    const order = byProfile(overview.profile, overview.profiles.length);
    layout.current = { side: side / scale, columns, order };
    const wide = columns * side;
    canvas.current.width = wide;
    canvas.current.height = rows * side;
    canvas.current.style.width = `${wide / scale}px`;
    canvas.current.style.height = `${(rows * side) / scale}px`;
    const pen = canvas.current.getContext("2d"), image = pen.createImageData(wide, rows * side);
    const pixels = new Uint32Array(image.data.buffer), filled = side - 1;
    const slope = high > low ? (STEPS - 1) / Math.log(high / low) : 0;
    for (let place = 0; place < order.length; place += 1) {
      const device = order[place], value = overview.tpot_ms[device];
      const grey = value === null || overview.stale[device] || overview.presence[device] === "offline";
      const step = Math.min(STEPS - 1, Math.max(0, Math.round(slope * Math.log(value / low)))) || 0;
      const begin = Math.floor(place / columns) * side * wide + (place % columns) * side;
      for (let row = 0; row < filled; row += 1) pixels.fill(grey ? GREY : COLOURS[step], begin + row * wide, begin + row * wide + filled);
    }
    pen.putImageData(image, 0, 0);
  }, [overview, width]);
  function under(event) {
    const { side, columns, order } = layout.current;
    const column = Math.floor(event.offsetX / side), row = Math.floor(event.offsetY / side);
    return column < columns ? order[row * columns + column] : undefined;
  }
  function say(event) {
    const device = under(event);
    if (device === undefined) { setSaid(""); return; }
    const value = overview.tpot_ms[device];
    setSaid(`${overview.devices[device]}, ${overview.profiles[overview.profile[device]]}: ` +
      (value === null ? "no figure yet" : `${value.toFixed(1)} ms a token${overview.stale[device] ? ", not fresh" : ""}`));
  }
  const legend = some
    ? `blue ${low.toFixed(1)} ms a token, red ${high.toFixed(1)} ms; grey: offline, or no fresh figure`
    : "no device has reported a figure yet";
  return html`<figure class="heat"><div><canvas ref=${canvas} role="img"
      aria-label=${`Time per token of ${overview.devices.length} devices: ${legend}. The table below has the same by profile.`}
      onMouseMove=${say} onMouseLeave=${() => setSaid("")}
      onClick=${(event) => { const device = under(event); if (device !== undefined) location.hash = `#/devices/${overview.devices[device]}`; }}></canvas></div>
    <figcaption class="quiet">${said || legend}</figcaption></figure>`;
}

/** The places of the devices, sorted by profile. */
function byProfile(profile, profiles) {
  const next = new Uint32Array(profiles + 1);
  for (const one of profile) next[one + 1] += 1;
  for (let one = 0; one < profiles; one += 1) next[one + 1] += next[one];
  const order = new Uint32Array(profile.length);
  profile.forEach((one, device) => { order[next[one]] = device; next[one] += 1; });
  return order;
}

const DARK = matchMedia("(prefers-color-scheme: dark)");
function useDark() {
  const [dark, setDark] = useState(DARK.matches);
  useEffect(() => {
    const changed = () => setDark(DARK.matches);
    DARK.addEventListener("change", changed);
    return () => DARK.removeEventListener("change", changed);
  }, []);
  return dark;
}

/** One line over time. `times` are seconds since 1970, ascending. */
export function Line({ label, unit, times, values }) {
  const place = useRef(null);
  const plot = useRef(null);
  const there = values.filter((value) => value !== null);
  const dark = useDark();
  useEffect(() => {
    if (!there.length) return undefined;
    const style = getComputedStyle(document.documentElement);
    const axis = { stroke: style.getPropertyValue("--quiet"), grid: { stroke: style.getPropertyValue("--line") }, font: "12px system-ui" };
    const width = place.current.clientWidth || 300;
    plot.current = new uPlot({
      width, height: 140, legend: { show: false }, cursor: { show: false }, series: [{}, { stroke: style.getPropertyValue("--accent"), width: 1.5, spanGaps: true }],
      axes: [axis, { ...axis, size: 52 }],
    }, [times, values], place.current);
    return () => { plot.current.destroy(); plot.current = null; };
  }, [there.length > 0, dark]);
  useEffect(() => { plot.current?.setData([times, values]); }, [times, values]);
  const last = there.length ? there[there.length - 1] : null;
  return html`<figure class="line"><figcaption>${label} <b>${last === null ? "-" : `${last.toFixed(last < 10 ? 1 : 0)} ${unit}`}</b></figcaption>
    ${there.length ? html`<div ref=${place} role="img" aria-label=${`${label}: newest ${last} ${unit}, from ${Math.min(...there)} to ${Math.max(...there)} over ${there.length} reports`}></div>`
      : html`<p class="empty">no report has this figure yet</p>`}</figure>`;
}

/** Loss over size: one mark an artifact, by toolchain. */
export function Frontier({ artifacts }) {
  const measured = artifacts.filter((one) => one.quality);
  if (measured.length < 2) return null;
  const kinds = [...new Set(measured.map((one) => one.toolchain))].sort();
  const sizes = measured.map((one) => one.size), losses = measured.map((one) => Math.max(1e-4, one.quality.kl_divergence));
  const span = (values) => [Math.log(Math.min(...values)) - 0.15, Math.log(Math.max(...values)) + 0.15];
  const [left, right] = span(sizes), [bottom, top] = span(losses);
  const x = (size) => 60 + (520 * (Math.log(size) - left)) / (right - left);
  const y = (loss) => 210 - (190 * (Math.log(loss) - bottom)) / (top - bottom);
  const mark = (kind, cx, cy) => [
    html`<circle cx=${cx} cy=${cy} r="5"/>`, html`<rect x=${cx - 5} y=${cy - 5} width="10" height="10"/>`,
    html`<path d=${`M${cx},${cy - 6}l6,11h-12z`}/>`, html`<path d=${`M${cx},${cy - 6}l6,6l-6,6l-6,-6z`}/>`][kinds.indexOf(kind) % 4];
  return html`<figure><svg viewBox="0 0 600 250" class="frontier" role="img" aria-label="Loss over size of the artifacts; the table has the figures">
      <path class="axis" d="M60,10V215H590"/><text x="325" y="244" text-anchor="middle">size (log)</text><text x="6" y="20">loss (log)</text>
      <text x="60" y="230">${bytes(Math.min(...sizes))}</text><text x="590" y="230" text-anchor="end">${bytes(Math.max(...sizes))}</text>
      ${measured.map((one) => html`<g class=${`kind${kinds.indexOf(one.toolchain) % 4}`}><title>${one.artifact}: ${bytes(one.size)}, ${one.quality.kl_divergence.toFixed(3)} nats</title>
        ${mark(one.toolchain, x(one.size), y(Math.max(1e-4, one.quality.kl_divergence)))}</g>`)}
    </svg><figcaption class="legend">${kinds.map((kind, index) => html`<span><svg width="16" height="14" aria-hidden="true" class=${`kind${index % 4}`}>${mark(kind, 8, 7)}</svg> ${kind}</span>`)}</figcaption></figure>`;
}
