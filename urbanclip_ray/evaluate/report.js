"use strict";
// What the page does once it is read: draws plots and maps that come into view, sorts tables, shows tiles under the pointer.
// Text from data is only ever set as text, never as HTML.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures");
const maps = read("maps");
for (const panel of maps.panels) panel.row = Object.fromEntries(panel.at.map((index, row) => [index, row]));
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = (value) => Number(value).toPrecision(4).replace(/^(-?\d+\.\d*?)0+$/, "$1").replace(/\.$/, "").replace("-", "−");
const PART_NAMES = { t: "train", v: "val", e: "test", b: "buffer", "-": "in no part" };
const PLOT_OPTIONS = { responsive: true, displaylogo: false, displayModeBar: false };
const AXIS = { left: 46, right: 4, top: 4, bottom: 20 };
const MIN_TILE_PX = 2.5;
const TIP_PX = 112;

// --- the tile under the pointer

const tip = document.getElementById("tip");
const picture = tip.querySelector("canvas");
const sheetImages = new Map();

function sheetImage(index) {
  if (!sheetImages.has(index)) {
    const image = new Image();
    image.src = "data:image/webp;base64," + document.getElementById("sheet-" + index).textContent;
    sheetImages.set(index, image.decode().then(() => image));
  }
  return sheetImages.get(index);
}

async function showTip(tile, lines, x, y) {
  tip.hidden = false;
  tip.dataset.tile = tile;
  const words = tip.querySelector(".lines");
  words.replaceChildren(...[maps.tiles.ids[tile], ...lines].map((line) => {
    const element = document.createElement("div");
    element.textContent = line;
    return element;
  }));
  const place = maps.tiles.thumb[tile];
  picture.hidden = place < 0;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
  tip.style.top = Math.max(4, y + 14 + box.height > innerHeight ? y - box.height - 10 : y + 14) + "px";
  if (place < 0) return;
  const { cells, columns, side } = maps.sheets;
  const image = await sheetImage(Math.floor(place / cells));
  if (tip.dataset.tile !== String(tile)) return; // the pointer has gone on
  const cell = place % cells;
  const context = picture.getContext("2d");
  context.drawImage(image, (cell % columns) * side, Math.floor(cell / columns) * side, side, side, 0, 0, TIP_PX, TIP_PX);
  picture.dataset.shown = tile;
}

function hideTip() {
  tip.hidden = true;
}

function describe(panel, row) {
  const [truth, prediction] = [panel.y[row], panel.y_pred[row]];
  return [`truth ${number(truth)}`, `prediction ${number(prediction)}`, `residual ${number(prediction - truth)}`];
}

// --- maps

const views = new Map(); // one for all maps that show the same: centre and zoom

function viewOf(canvas) {
  const key = canvas.dataset.view;
  if (!views.has(key)) views.set(key, { lon: null, lat: null, zoom: 1 });
  return views.get(key);
}

function geometry(canvas) {
  const area = maps.areas[canvas.dataset.area];
  const view = viewOf(canvas);
  const width = canvas.clientWidth - AXIS.left - AXIS.right;
  const height = canvas.clientHeight - AXIS.top - AXIS.bottom;
  const [west, south, east, north] = area.box;
  const degree = Math.min(width / (east - west), height / ((north - south) * area.stretch)) * view.zoom;
  const lon = view.lon ?? (west + east) / 2;
  const lat = view.lat ?? (south + north) / 2;
  return {
    area, width, height, degree, lon, lat,
    x: (value) => AXIS.left + width / 2 + (value - lon) * degree,
    y: (value) => AXIS.top + height / 2 - (value - lat) * degree * area.stretch,
    tileWidth: Math.max(MIN_TILE_PX, area.width * degree),
    tileHeight: Math.max(MIN_TILE_PX, area.height * degree * area.stretch),
  };
}

function fitHeight(canvas) {
  const area = maps.areas[canvas.dataset.area];
  const [west, south, east, north] = area.box;
  const wanted = (canvas.clientWidth - AXIS.left) * ((north - south) * area.stretch) / (east - west) + AXIS.bottom + AXIS.top;
  canvas.style.height = Math.round(Math.min(420, Math.max(200, wanted))) + "px";
}

function colourOf(canvas) {
  const { kind } = canvas.dataset;
  if (kind === "split") {
    const parts = maps.areas[canvas.dataset.area].parts[canvas.dataset.split];
    const colours = Object.fromEntries(Object.keys(PART_NAMES).map((part) => [part, ink("--part-" + (part === "-" ? "none" : part))]));
    return { rows: null, colour: (index) => colours[parts[index]] };
  }
  const panel = maps.panels[canvas.dataset.panel];
  const [scale, low, high, value] = {
    truth: [maps.scales.values, panel.low, panel.high, (row) => panel.y[row]],
    prediction: [maps.scales.values, panel.low, panel.high, (row) => panel.y_pred[row]],
    residual: [maps.scales.signed, -panel.reach, panel.reach, (row) => panel.y_pred[row] - panel.y[row]],
  }[kind];
  const place = (row) => Math.round(Math.min(1, Math.max(0, (value(row) - low) / (high - low))) * (scale.length - 1));
  return { rows: panel.row, colour: (row) => scale[place(row)] };
}

function drawMap(canvas) {
  if (!canvas.style.height) fitHeight(canvas);
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const place = geometry(canvas);
  const { area, tileWidth, tileHeight } = place;
  context.save();
  context.beginPath();
  context.rect(AXIS.left, AXIS.top, place.width, place.height);
  context.clip();
  const rectangle = (index) => context.fillRect(
    place.x(area.lon[index]) - tileWidth / 2, place.y(area.lat[index]) - tileHeight / 2, tileWidth, tileHeight);
  const { rows, colour } = colourOf(canvas);
  if (rows === null) {
    area.lon.forEach((_, index) => { context.fillStyle = colour(index); rectangle(index); });
  } else {
    context.fillStyle = ink("--other");
    area.lon.forEach((_, index) => { if (!(index in rows)) rectangle(index); });
    for (const index of Object.keys(rows)) { context.fillStyle = colour(rows[index]); rectangle(index); }
  }
  context.restore();
  drawTicks(context, place);
  canvas.dataset.drawn = "yes";
}

function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((candidate) => candidate >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push([at, at.toFixed(digits).replace("-", "−") + "°"]);
  return found;
}

function drawTicks(context, { width, height, degree, lon, lat, area, x, y }) {
  context.strokeStyle = ink("--line");
  context.strokeRect(AXIS.left + 0.5, AXIS.top + 0.5, width - 1, height - 1);
  context.fillStyle = ink("--muted");
  context.font = "11px system-ui, sans-serif";
  const [halfLon, halfLat] = [width / 2 / degree, height / 2 / degree / area.stretch];
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const [at, text] of ticks(lon - halfLon, lon + halfLon)) {
    if (x(at) > AXIS.left + 16 && x(at) < AXIS.left + width - 14) context.fillText(text, x(at), AXIS.top + height + 4);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const [at, text] of ticks(lat - halfLat, lat + halfLat)) {
    if (y(at) > AXIS.top + 6 && y(at) < AXIS.top + height - 4) context.fillText(text, AXIS.left - 5, y(at));
  }
}

function tileAt(canvas, x, y) {
  const { area, tileWidth, tileHeight, ...place } = geometry(canvas);
  let best = -1, nearest = Infinity;
  const rows = canvas.dataset.kind === "split" ? null : maps.panels[canvas.dataset.panel].row;
  for (let index = 0; index < area.lon.length; index += 1) {
    const [dx, dy] = [Math.abs(place.x(area.lon[index]) - x), Math.abs(place.y(area.lat[index]) - y)];
    if (dx > tileWidth / 2 + 1 || dy > tileHeight / 2 + 1) continue;
    const distance = dx + dy - (rows !== null && index in rows ? 1e3 : 0); // coloured tiles lie on top
    if (distance < nearest) [best, nearest] = [index, distance];
  }
  return best;
}

function redraw(key) {
  for (const canvas of document.querySelectorAll("canvas.map[data-drawn]")) {
    if (canvas.dataset.view === key && canvas.offsetParent !== null) drawMap(canvas);
  }
}

function zoom(key, factor) {
  const canvas = [...document.querySelectorAll("canvas.map")].find((other) => other.dataset.view === key);
  const view = viewOf(canvas);
  view.zoom = Math.min(200, Math.max(1, view.zoom * factor));
  if (view.zoom === 1) view.lon = view.lat = null;
  redraw(key);
}

function listen(canvas) {
  let dragged = null;
  canvas.addEventListener("pointermove", (event) => {
    if (dragged !== null) {
      const { degree, area, lon, lat } = geometry(canvas);
      const view = viewOf(canvas);
      view.lon = lon - (event.clientX - dragged[0]) / degree;
      view.lat = lat + (event.clientY - dragged[1]) / degree / area.stretch;
      dragged = [event.clientX, event.clientY];
      redraw(canvas.dataset.view);
      return;
    }
    const box = canvas.getBoundingClientRect();
    const index = tileAt(canvas, event.clientX - box.left, event.clientY - box.top);
    if (index < 0) return hideTip();
    const area = maps.areas[canvas.dataset.area];
    let lines;
    if (canvas.dataset.kind === "split") {
      lines = [PART_NAMES[area.parts[canvas.dataset.split][index]]];
    } else {
      const panel = maps.panels[canvas.dataset.panel];
      lines = index in panel.row ? describe(panel, panel.row[index]) : ["not in the test part"];
    }
    return void showTip(area.tile[index], lines, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerdown", (event) => {
    if (viewOf(canvas).zoom === 1) return;
    dragged = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
    hideTip();
  });
  canvas.addEventListener("pointerup", () => { dragged = null; });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("dblclick", () => zoom(canvas.dataset.view, 2));
}

for (const canvas of document.querySelectorAll("canvas.map")) listen(canvas);
for (const button of document.querySelectorAll("button[data-zoom]")) {
  button.addEventListener("click", () => zoom(button.dataset.view, Number(button.dataset.zoom)));
}
for (const scale of document.querySelectorAll(".scale")) {
  const panel = maps.panels[scale.dataset.panel];
  const signed = scale.dataset.kind === "residual";
  const colours = (signed ? maps.scales.signed : maps.scales.values).filter((_, index) => index % 15 === 0);
  const [low, high] = signed ? [-panel.reach, panel.reach] : [panel.low, panel.high];
  scale.querySelector(".bar").style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  scale.querySelector(".low").textContent = number(low);
  scale.querySelector(".high").textContent = number(high);
}
for (const select of document.querySelectorAll("select.split-choice")) {
  select.addEventListener("change", () => {
    for (const canvas of document.querySelectorAll('canvas.map[data-kind="split"]')) {
      canvas.dataset.split = select.value;
      if (canvas.dataset.drawn && canvas.offsetParent !== null) drawMap(canvas);
    }
  });
}

// --- plots

async function drawPlot(place) {
  const { data, layout } = figures[place.dataset.figure];
  layout.font = { ...layout.font, color: ink("--ink") };
  layout.hoverlabel = { align: "left" };
  for (const note of layout.annotations ?? []) note.bgcolor = ink("--paper"); // lines pass behind words
  place.dataset.drawn = "begun";
  await Plotly.newPlot(place, data, layout, PLOT_OPTIONS);
  place.dataset.drawn = "yes";
  if (place.dataset.linked !== undefined) {
    place.on("plotly_hover", ({ points: [point] }) => pointOut(point.data.meta));
    place.on("plotly_unhover", () => pointOut(null));
  }
  if (place.dataset.panel === undefined) return;
  const panel = maps.panels[place.dataset.panel];
  place.on("plotly_hover", ({ points: [point], event }) => {
    const row = point.customdata;
    if (row !== undefined) showTip(panel.tile[row], describe(panel, row), event.clientX, event.clientY);
  });
  place.on("plotly_unhover", hideTip);
}

// One trial of a search in all plots and in the table: the others fade. Without a number all are as they were.
function pointOut(trial = null) {
  for (const place of document.querySelectorAll('.plot[data-linked][data-drawn="yes"]')) {
    const fades = place.data.map(({ meta }) => (trial === null || meta === undefined || meta === trial ? 1 : 0.12));
    if (fades.length) Plotly.restyle(place, { opacity: fades });
  }
  for (const row of document.querySelectorAll("tr[data-trial]")) row.classList.toggle("pointed", row.dataset.trial === String(trial));
}

for (const row of document.querySelectorAll("tr[data-trial]")) {
  row.addEventListener("pointerenter", () => pointOut(Number(row.dataset.trial)));
  row.addEventListener("pointerleave", () => pointOut());
}

async function draw(place) {
  if (place.dataset.drawn || place.offsetParent === null) return;
  if (place.matches("canvas")) drawMap(place);
  else await drawPlot(place);
}

const drawn = "canvas.map, .plot";
const nearView = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "500px" });
for (const place of document.querySelectorAll(drawn)) nearView.observe(place);
addEventListener("beforeprint", () => document.querySelectorAll(drawn).forEach(draw));

// --- choices of what is shown

for (const select of document.querySelectorAll("select.choice")) {
  const choose = () => {
    for (const shown of document.querySelectorAll(`[data-choice="${select.name}"]`)) shown.hidden = shown.dataset.index !== select.value;
  };
  select.closest("[hidden]").hidden = false;
  select.addEventListener("change", choose);
  choose();
}

// --- tables that can be sorted

for (const button of document.querySelectorAll("table.sortable thead button")) {
  const header = button.closest("th");
  const table = button.closest("table");
  button.addEventListener("click", () => {
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const value = (row) => row.cells[header.cellIndex].dataset.value;
    const isNumber = header.dataset.kind === "number";
    const compare = (first, second) => {
      const [a, b] = [value(first), value(second)];
      if (a === "" || b === "") return (a === "") - (b === ""); // what is unknown comes last either way
      const order = isNumber ? a - b : a.localeCompare(b);
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}

// --- what changes with the window

let resized = null;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    for (const canvas of document.querySelectorAll("canvas.map[data-drawn]")) {
      if (canvas.offsetParent !== null) { fitHeight(canvas); drawMap(canvas); }
    }
  }, 100);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const place of document.querySelectorAll('.plot[data-drawn="yes"]')) {
    const annotations = place.layout.annotations?.map((note) => ({ ...note, bgcolor: ink("--paper") }));
    Plotly.relayout(place, { "font.color": ink("--ink"), ...(annotations && { annotations }) });
  }
  for (const canvas of document.querySelectorAll("canvas.map[data-drawn]")) if (canvas.offsetParent !== null) drawMap(canvas);
});

const firstView = [...document.querySelectorAll(drawn)].filter((place) => {
  const box = place.getBoundingClientRect();
  return place.offsetParent !== null && box.top < innerHeight && box.bottom > 0;
});
Promise.all(firstView.map(draw)).then(() => requestAnimationFrame(() => {
  performance.mark("drawn");
  document.documentElement.dataset.drawn = "yes";
}));
