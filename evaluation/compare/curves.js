"use strict";
// Draws the curves of a comparison from the JSON of the page, and lets the reader choose what is shown.
// curves.py says what the data hold. The curves are drawn again at each change; that takes some milliseconds.

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);
const chart = document.getElementById("chart");
const svg = document.getElementById("curves");
const tip = chart.querySelector(".tip");
const spoken = chart.querySelector(".unseen");
const [metricBox, axisBox, rangeBox] = ["metric", "axis", "range"].map((id) => document.getElementById(id));
const entries = [...chart.querySelectorAll(".legend button")];
const MARGIN = { left: 58, right: 18, top: 12, bottom: 46 };
const MAX_ROWS = 14; // of values under the pointer
const MARKS = 8; // along a line; of lines with up to 20 points, each has one
const TITLES = { epoch: "epoch", minutes: "training time (minutes, without evaluation)" };
const drawn = { lines: [], stops: [], cursor: null };

function add(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

function isShown(number) {
  return entries[number].getAttribute("aria-pressed") === "true";
}

// Returns the visible lines, each with its points { x, epoch, mean, std } from the chosen part of the training on.
function selectLines() {
  const metric = metricBox.selectedIndex;
  const longest = Math.max(0, ...data.groups.flatMap((group) => group.lines.map((line) => lastOf(line.curves[metric]))));
  const start = Number(rangeBox.value) * longest;
  const lines = [];
  data.groups.forEach((group, number) => {
    if (!isShown(number)) return;
    for (const line of group.lines) {
      const curve = line.curves[metric];
      const points = (curve ? curve.epoch : [])
        .map((epoch, k) => ({
          epoch,
          x: curve[axisBox.value][k],
          mean: curve.mean[k],
          std: curve.std ? curve.std[k] : null,
        }))
        .filter((point) => point.epoch > start && point.mean !== null);
      if (points.length) lines.push({ group, number, line, points });
    }
  });
  return lines;
}

function lastOf(curve) {
  return curve ? curve.epoch[curve.epoch.length - 1] : 0;
}

function makeTicks(low, high, count, whole) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step);
  return { ticks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function findLimits(lines) {
  const points = lines.flatMap((line) => line.points);
  const xs = points.map((point) => point.x);
  const ys = points.flatMap(({ mean, std }) => [mean - (std ?? 0), mean + (std ?? 0)]);
  let [x1, x2, y1, y2] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (x1 === x2) [x1, x2] = [x1 - 0.5, x2 + 0.5];
  const pad = y2 > y1 ? 0.05 * (y2 - y1) : Math.abs(y1) * 0.05 || 1;
  return { x1, x2, y1: y1 - pad, y2: y2 + pad };
}

function measureWidth() {
  return Math.max(280, svg.parentElement.clientWidth);
}

function draw() {
  const width = measureWidth();
  const height = Math.round(Math.min(480, Math.max(280, 0.48 * width)));
  const lines = selectLines();
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  hideTip();
  Object.assign(drawn, { lines, width, height, stops: [], cursor: null });
  const title = metricBox.selectedOptions[0].textContent;
  svg.setAttribute("aria-label", `${title} against ${TITLES[axisBox.value]}; the arrow keys read values`);
  if (!lines.length) {
    add(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no group with such values is shown");
    return;
  }
  const limits = findLimits(lines);
  const scaleX = (x) => MARGIN.left + ((x - limits.x1) / (limits.x2 - limits.x1)) * (width - MARGIN.left - MARGIN.right);
  const scaleY = (y) =>
    height - MARGIN.bottom - ((y - limits.y1) / (limits.y2 - limits.y1)) * (height - MARGIN.top - MARGIN.bottom);
  Object.assign(drawn, { scaleX, scaleY });
  drawn.stops = [...new Set(lines.flatMap((line) => line.points.map((point) => point.x)))].sort((a, b) => a - b);
  drawAxes(limits, title);
  for (const line of lines) drawLine(line);
}

function drawAxes({ x1, x2, y1, y2 }, title) {
  const { width, height, scaleX, scaleY } = drawn;
  const bottom = height - MARGIN.bottom;
  const across = makeTicks(x1, x2, Math.max(3, width / 110), axisBox.value === "epoch");
  const up = makeTicks(y1, y2, Math.max(3, height / 65), false);
  for (const tick of up.ticks) {
    const y = scaleY(tick);
    add(svg, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y });
    add(svg, "text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, formatTick(tick, up.digits));
  }
  for (const tick of across.ticks) {
    add(svg, "line", { class: "axis", x1: scaleX(tick), x2: scaleX(tick), y1: bottom, y2: bottom + 4 });
    add(svg, "text", { x: scaleX(tick), y: bottom + 18, "text-anchor": "middle" }, formatTick(tick, across.digits));
  }
  add(svg, "line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom });
  const middle = (MARGIN.left + width - MARGIN.right) / 2;
  add(svg, "text", { class: "title", x: middle, y: height - 8, "text-anchor": "middle" }, TITLES[axisBox.value]);
  const half = (MARGIN.top + bottom) / 2;
  const fits = title.length * 7 < bottom ? title : title.replace(/\s*\(.*/, "");
  add(svg, "text", { class: "title", "text-anchor": "middle", transform: `translate(13 ${half}) rotate(-90)` }, fits);
}

function formatTick(value, digits) {
  return digits > 4 ? value.toExponential(1) : value.toFixed(digits);
}

function drawLine({ group, number, line, points }) {
  const { scaleX, scaleY } = drawn;
  const series = add(svg, "g", { class: "series", "data-group": number });
  series.style.setProperty("--line", group.colour);
  const join = (corners) => corners.map(([x, y]) => `${scaleX(x).toFixed(1)},${scaleY(y).toFixed(1)}`).join(" ");
  if (points[0].std !== null && points.length > 1) {
    const top = points.map(({ x, mean, std }) => [x, mean + std]);
    const low = points.map(({ x, mean, std }) => [x, mean - std]).reverse();
    add(series, "polygon", { class: "band", points: join([...top, ...low]) });
  }
  const kind = line.mean ? "line" : "line alone";
  add(series, "polyline", { class: kind, points: join(points.map(({ x, mean }) => [x, mean])) });
  const step = points.length <= 20 ? 1 : Math.ceil(points.length / MARKS);
  for (let k = points.length - 1; k >= 0; k -= step) {
    const place = `translate(${scaleX(points[k].x)} ${scaleY(points[k].mean)})`;
    add(series, "path", { class: line.mean ? "mark" : "mark open", d: group.shape, transform: place });
  }
}

// ---- Values under the pointer, or at the place that the arrow keys have reached ----

function showTip(x) {
  const { lines, width, height, scaleX, scaleY } = drawn;
  svg.querySelectorAll(".pointed").forEach((element) => element.remove());
  const at = axisBox.value === "epoch" ? `epoch ${x}` : `${Number(x.toPrecision(4))} minutes`;
  const rows = lines
    .map((line) => ({ ...line, point: nearestPoint(line.points, x) }))
    .filter(({ point }) => axisBox.value === "minutes" || point.epoch === x)
    .sort((one, other) => other.point.mean - one.point.mean);
  add(svg, "line", {
    class: "guide pointed", x1: scaleX(x), x2: scaleX(x), y1: MARGIN.top, y2: height - MARGIN.bottom,
  });
  for (const { group, number, point } of rows) {
    const place = `translate(${scaleX(point.x)} ${scaleY(point.mean)}) scale(1.5)`;
    const series = add(svg, "g", { class: "series pointed" });
    series.style.setProperty("--line", group.colour);
    add(series, "path", { class: "mark", d: group.shape, transform: place, "data-group": number });
  }
  tip.replaceChildren(makeElement("b", at), ...rows.slice(0, MAX_ROWS).map(makeTipRow));
  if (rows.length > MAX_ROWS) tip.append(makeElement("div", `and ${rows.length - MAX_ROWS} lower values`));
  tip.hidden = false;
  const left = scaleX(x) < width / 2 ? scaleX(x) + 12 : scaleX(x) - 12 - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(width - tip.offsetWidth, left))}px`;
  drawn.cursor = x;
  return [at, ...rows.map((row) => `${describeLine(row)} ${formatPoint(row.point)}`)].join("; ");
}

function makeElement(name, text, kind = "") {
  const element = document.createElement(name);
  element.textContent = text;
  element.className = kind;
  return element;
}

function describeLine({ group, line }) {
  return line.mean ? group.label : `${group.label}, ${line.name}`;
}

function makeTipRow(row) {
  const element = makeElement("div", "");
  const swatch = entries[row.number].querySelector("svg").cloneNode(true);
  const time = axisBox.value === "minutes" ? `, epoch ${row.point.epoch}` : "";
  element.append(swatch, makeElement("span", describeLine(row), "name"));
  element.append(makeElement("span", formatPoint(row.point) + time));
  return element;
}

function formatPoint({ mean, std }) {
  const digits = Math.abs(mean) >= 1 ? 2 : 4;
  return mean.toFixed(digits) + (std === null ? "" : ` \u00b1 ${std.toFixed(digits)}`);
}

function nearestPoint(points, x) {
  return points.reduce((best, point) => (Math.abs(point.x - x) < Math.abs(best.x - x) ? point : best));
}

function hideTip() {
  tip.hidden = true;
  drawn.cursor = null;
  svg.querySelectorAll(".pointed").forEach((element) => element.remove());
}

svg.addEventListener("pointermove", (event) => {
  if (!drawn.stops.length) return;
  const box = svg.getBoundingClientRect();
  const place = ((event.clientX - box.left) / box.width) * drawn.width;
  const gap = (stop) => Math.abs(drawn.scaleX(stop) - place);
  const x = drawn.stops.reduce((best, stop) => (gap(stop) < gap(best) ? stop : best));
  if (x !== drawn.cursor) showTip(x);
});
svg.addEventListener("pointerleave", hideTip);
svg.addEventListener("blur", hideTip);
svg.addEventListener("keydown", (event) => {
  const { stops, cursor } = drawn;
  const last = stops.length - 1;
  const now = cursor === null ? -1 : stops.indexOf(cursor);
  const next = {
    ArrowRight: Math.min(last, now + 1), ArrowLeft: cursor === null ? last : Math.max(0, now - 1), Home: 0, End: last,
  }[event.key];
  if (event.key === "Escape") hideTip();
  if (next === undefined || last < 0) return;
  event.preventDefault();
  spoken.textContent = showTip(stops[next]);
});

// ---- What is shown ----

function highlight(number) {
  for (const series of svg.querySelectorAll(".series")) {
    series.classList.toggle("dim", number !== null && isShown(number) && Number(series.dataset.group) !== number);
  }
}

function showGroups(choose) {
  entries.forEach((entry, number) => entry.setAttribute("aria-pressed", String(choose(number))));
  draw();
}

entries.forEach((entry, number) => {
  entry.addEventListener("click", () => {
    showGroups((other) => (other === number ? !isShown(other) : isShown(other)));
    highlight(number);
  });
  entry.addEventListener("pointerenter", () => highlight(number));
  entry.addEventListener("pointerleave", () => highlight(null));
});
document.getElementById("all").addEventListener("click", () => showGroups(() => true));
document.getElementById("none").addEventListener("click", () => showGroups(() => false));
for (const box of [metricBox, axisBox, rangeBox]) box.addEventListener("change", draw);
chart.hidden = false;
draw();
new ResizeObserver(() => measureWidth() !== drawn.width && draw()).observe(svg.parentElement);
