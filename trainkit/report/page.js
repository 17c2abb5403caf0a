"use strict";
// Draws the charts of a report. All numbers are in #data; what a chart needs is made when it scrolls near.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const DASHES = ["solid", "dash", "dot"];
  const COLOURS = 7;
  const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
  const MAP = VIRIDIS.map((colour, k) => [k / (VIRIDIS.length - 1), colour]);
  const BROKEN = "#d62728";
  const CONFIG = { displaylogo: false, responsive: true, displayModeBar: false };
  const hidden = new Set(); // numbers of the groups that are switched off; -1: all those without a colour

  const $ = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const node = (tag, attributes = {}, text = "") => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };
  // Plotly reads a few tags in its texts, and these are a user's words.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, most = 60) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
  const digits = (value) => (value === null ? "" : Number(value.toPrecision(4)).toString());
  const colour = (group) => (group.colour < 0 ? css("--others") : css(`--c${group.colour % COLOURS}`));
  const dash = (group) => (group.colour < 0 ? "solid" : DASHES[Math.floor(group.colour / COLOURS) % DASHES.length]);
  const off = (number) => hidden.has(data.groups[number].colour < 0 ? -1 : number);
  const see = (hex, share) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${share})`;
  };

  // --- drawing when near -----------------------------------------------------------------------------------------

  const makers = new Map(); // chart element -> function that draws it
  const drawn = new Set();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "400px" });

  function draw(element) {
    near.unobserve(element);
    drawn.add(element);
    makers.get(element)();
  }

  // A chart with its caption in `home`; make() returns [traces, layout].
  function chart(home, caption, height, make, note = "") {
    const figure = node("figure");
    const head = node("figcaption", {}, caption);
    if (note) head.append(" ", node("small", {}, note));
    const element = node("div", { class: "chart", role: "img", "aria-label": `${caption} ${note}`.trim() });
    element.style.height = `${height}px`;
    figure.append(head, element);
    home.append(figure);
    makers.set(element, () => {
      const [traces, layout] = make();
      Plotly.react(element, traces, layout, CONFIG);
    });
    near.observe(element);
    return figure;
  }

  function clear(home) {
    for (const element of home.querySelectorAll(".chart")) {
      near.unobserve(element);
      makers.delete(element);
      if (drawn.delete(element)) Plotly.purge(element);
    }
    home.replaceChildren();
  }

  function redraw() {
    for (const element of drawn) makers.get(element)();
  }

  function axis(title, more = {}) {
    return {
      title: { text: plain(title), font: { size: 13 }, standoff: 8 }, automargin: true, gridcolor: css("--line"),
      linecolor: css("--line"), zeroline: false, ticks: "", tickfont: { size: 12, color: css("--soft") }, ...more,
    };
  }

  function layout(x, y, more = {}) {
    return {
      margin: { l: 52, r: 12, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink"), size: 13 }, hovermode: "closest",
      // A finger on a chart is to scroll the page.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left", namelength: -1 },
      xaxis: x, yaxis: y, ...more,
    };
  }

  // --- curves ----------------------------------------------------------------------------------------------------

  function traces(series) {
    const found = [];
    const grey = { x: [], y: [], mode: "lines", hoverinfo: "skip", line: { color: css("--others"), width: 1 }, opacity: 0.6 };
    for (const line of series.lines) {
      const group = data.groups[line.group];
      if (group.colour >= 0 || hidden.has(-1)) continue;
      grey.x.push(...line.x, null);
      grey.y.push(...line.y, null);
    }
    if (grey.x.length) found.push(grey);
    for (const line of series.lines) {
      const group = data.groups[line.group];
      if (group.colour < 0 || off(line.group)) continue;
      const shade = colour(group);
      if (line.half && banded()) found.push(band(line, shade));
      const name = plain(short(group.label));
      const spread = (k) => (line.half && line.half[k] !== null ? ` ± ${digits(line.half[k])} (${line.runs[k]} runs)` : "");
      found.push({
        x: line.x, y: line.y, mode: line.x.length < 16 ? "lines+markers" : "lines", name, connectgaps: false,
        line: { color: shade, width: 2.2, dash: dash(group) }, marker: { size: 6, color: shade },
        text: line.y.map((value, k) => `${name}<br>step ${line.x[k].toLocaleString("en")}: ${digits(value)}${spread(k)}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    return found;
  }

  // There where the interval is known: along its upper end and back along its lower one, stretch by stretch.
  function band(line, shade) {
    const x = [], y = [];
    let stretch = [];
    const close = () => {
      if (stretch.length > 1) {
        for (const k of stretch) { x.push(line.x[k]); y.push(line.y[k] + line.half[k]); }
        for (const k of stretch.slice().reverse()) { x.push(line.x[k]); y.push(line.y[k] - line.half[k]); }
        x.push(null);
        y.push(null);
      }
      stretch = [];
    };
    line.x.forEach((_, k) => (line.half[k] === null || line.y[k] === null ? close() : stretch.push(k)));
    close();
    return { x, y, mode: "lines", fill: "toself", fillcolor: see(shade, 0.14), line: { width: 0 }, hoverinfo: "skip" };
  }

  // The ends of the lines that `who` picks by their group; share: how much of their intervals counts.
  function extent(series, log, who, share = 0) {
    let low = Infinity, high = -Infinity;
    for (const line of series.lines) {
      if (off(line.group) || !who(data.groups[line.group])) continue;
      line.y.forEach((value, k) => {
        if (value === null || (log && value <= 0)) return;
        const half = share && line.half ? share * (line.half[k] ?? 0) : 0;
        low = Math.min(low, log && value <= half ? value : value - half);
        high = Math.max(high, value + half);
      });
    }
    return [low, high];
  }

  const anyone = () => true, named = (group) => group.colour >= 0;

  // The axis holds the lines that have a colour; intervals and grey lines get as much room again, and no more.
  function range(series, log) {
    let [low, high] = extent(series, log, named);
    if (low > high) [low, high] = extent(series, log, anyone);
    if (low > high) return {};
    const [under, over] = extent(series, log, anyone, banded() ? 1 : 0), more = (high - low) / 2 || Math.abs(high);
    [low, high] = [log ? under : Math.max(under, low - more), Math.min(over, log ? over : high + more)];
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const room = 0.06 * (high - low) || Math.abs(low) * 0.05 || 0.5;
    return { range: [low - room, high + room] };
  }

  function curve(series, log) {
    const steps = axis("optimizer step", { rangemode: "tozero" });
    const values = axis(series.title + (series.unit ? ` (${series.unit})` : ""), { type: log ? "log" : "linear", ...range(series, log) });
    if (log) values.dtick = values.range && values.range[1] - values.range[0] > 2.5 ? 1 : "D2";
    else if (values.range && Math.max(...values.range.map(Math.abs)) < 1e-2) values.exponentformat = "power";
    return [traces(series), layout(steps, values)];
  }

  const banded = () => $("bands")?.checked ?? false;

  // Two seeds leave an interval of 13 standard errors: bands that would cover the lines are off until asked for.
  function offerBands() {
    const halves = data.losses.flatMap((series) => series.lines.flatMap((line) => (line.half ?? []).filter((half) => half !== null)));
    if (!halves.length) return $("bands").closest("label").remove();
    const spans = data.losses.map((series) => extent(series, false, anyone)).map(([low, high]) => high - low);
    const typical = halves.sort((a, b) => a - b)[Math.floor(halves.length / 2)];
    $("bands").checked = typical < 0.25 * Math.max(...spans);
    if (!$("bands").checked) $("bands-why").textContent = "(off at first: so wide that they would cover the lines)";
    $("bands").addEventListener("change", redraw);
  }

  function losses() {
    const home = $("loss-charts");
    home.classList.toggle("alone", data.losses.length === 1);
    for (const series of data.losses)
      chart(home, series.title, 340, () => curve(series, $("loss-log").checked));
    $("loss-log").addEventListener("change", redraw);
  }

  function others() {
    const select = $("metric"), chapters = new Map();
    data.series.forEach((series, k) => {
      if (!chapters.has(series.chapter)) chapters.set(series.chapter, node("optgroup", { label: series.chapter }));
      chapters.get(series.chapter).append(node("option", { value: k }, series.title));
    });
    select.append(...chapters.values());
    const first = data.series.findIndex((series) => series.name === "lr");
    select.value = Math.max(0, first);
    const show = () => {
      clear($("series-chart"));
      const series = data.series[select.value];
      chart($("series-chart"), series.title, 380, () => curve(series, $("series-log").checked), series.name);
    };
    select.addEventListener("change", show);
    $("series-log").addEventListener("change", redraw);
    if (data.left) $("series-left").textContent = `For ${data.left} further metrics there is no room here; each run's metrics.jsonl has them.`;
    show();
  }

  // --- by depth --------------------------------------------------------------------------------------------------

  const finite = (measure, pick) => measure.maps.flatMap(pick).filter((value) => typeof value === "number" && (!measure.log || value > 0));
  // Where a value lies on a measure's scale, which is logarithmic for what spans powers of ten.
  const placed = (measure, value) => (measure.log ? Math.log10(value) : value);

  // A scale that all maps share: the middle 98 % of the values, so that one spike does not take all the colours.
  function spanned(measure) {
    const sorted = finite(measure, (map) => map.cells.flat()).sort((a, b) => a - b);
    if (!sorted.length) return [-1, 0];
    const at = (share) => placed(measure, sorted[Math.round(share * (sorted.length - 1))]);
    const [low, high] = [at(0.01), at(0.99)];
    return high - low > 1e-3 * Math.abs(high) ? [low, high] : [low - 0.2, high + 0.2];
  }

  // Round numbers of a scale from `low` to `high`, as [where, value]: between powers of ten only where these are few.
  function ticks(measure, low, high) {
    const place = (values) => values.map((value) => [placed(measure, value), value]).filter(([at]) => at >= low && at <= high);
    for (const subs of measure.log ? [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]] : []) {
      const powers = Array.from({ length: Math.ceil(high - low) + 2 }, (_, k) => Math.floor(low) + k);
      const found = place(powers.flatMap((power) => subs.map((sub) => Number((sub * 10 ** power).toPrecision(3)))));
      if (found.length >= 3) return found;
    }
    const [from, to] = measure.log ? [10 ** low, 10 ** high] : [low, high];
    const rough = (to - from) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power, first = Math.ceil(from / step);
    return place(Array.from({ length: 8 }, (_, k) => Number(((first + k) * step).toPrecision(6))));
  }

  const few = (found, most) => found.filter((_, k) => k % Math.ceil(found.length / most) === 0);
  const written = (value) => {
    const size = Math.abs(value);
    return size && (size >= 1e5 || size < 1e-3) ? Number(value.toPrecision(3)).toExponential().replace("e+", "e") : value.toString();
  };

  function scale(home, measure, low, high) {
    home.replaceChildren();
    const bar = node("div", { class: "bar" });
    bar.style.background = `linear-gradient(90deg, ${VIRIDIS.join(",")})`;
    const marks = node("div", { class: "ticks" });
    for (const [at, value] of few(ticks(measure, low, high), 7)) {
      const mark = node("span", {}, written(value));
      mark.style.left = `${(100 * (at - low)) / (high - low)}%`;
      marks.append(mark);
    }
    home.append(node("div", {}, `${measure.axis}; ${measure.log ? "logarithmic, " : ""}one scale for all maps`), bar, marks);
    if (measure.maps.some((map) => map.cells.some((row) => row.includes("inf")))) {
      const told = node("div");
      told.append(node("span", { class: "broken" }), " not finite");
      home.append(told);
    }
  }

  // Cells reach half-way to their neighbours.
  function edges(steps) {
    if (steps.length < 2) return [steps[0] - 0.5, steps[0] + 0.5];
    const between = steps.slice(1).map((step, k) => (step + steps[k]) / 2), last = steps.length - 1;
    return [Math.max(0, 2 * steps[0] - between[0]), ...between, 2 * steps[last] - between[last - 1]];
  }

  function heat(map, measure, low, high) {
    const value = (cell) => (typeof cell === "number" ? (cell > 0 || !measure.log ? placed(measure, cell) : low - 1) : null);
    const said = (cell) => (cell === "inf" ? "not finite" : digits(cell));
    const shared = { x: edges(map.steps), y: map.blocks, type: "heatmap", showscale: false, hoverongaps: false };
    const found = [{
      ...shared, z: map.cells.map((row) => row.map(value)), zmin: low, zmax: high, colorscale: MAP,
      text: map.cells.map((row, b) => row.map((cell, k) => `block ${map.blocks[b]}, step ${map.steps[k].toLocaleString("en")}: ${said(cell)}`)),
      hovertemplate: "%{text}<extra></extra>",
    }];
    if (map.cells.some((row) => row.includes("inf")))
      found.push({ ...shared, z: map.cells.map((row) => row.map((cell) => (cell === "inf" ? 1 : null))), colorscale: [[0, BROKEN], [1, BROKEN]], hoverinfo: "skip" });
    const steps = axis("optimizer step", { showgrid: false, nticks: 5 });
    const depth = axis("block", { type: "category", showgrid: false, dtick: Math.ceil(map.blocks.length / 12), tick0: 0 });
    return [found, layout(steps, depth)];
  }

  function profile(measure, at, low, high) {
    const found = [];
    for (const map of measure.maps) {
      if (off(map.group)) continue;
      const group = data.groups[map.group], { step, values } = map.profiles[at], shade = colour(group);
      const name = plain(short(group.label));
      found.push({
        x: map.blocks, y: values.map((value) => (typeof value === "number" && (value > 0 || !measure.log) ? value : null)), name, mode: "lines+markers",
        line: { color: shade, width: 2.4, dash: dash(group) }, marker: { size: 7, color: shade },
        text: values.map((value, b) => `${name}<br>block ${map.blocks[b]}, step ${step.toLocaleString("en")}: ${value === "inf" ? "not finite" : digits(value)}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const deepest = Math.max(...measure.maps.map((map) => map.blocks.length));
    const marks = few(ticks(measure, low, high), 6);
    const depth = axis("block (input → output)", { type: "category", dtick: Math.ceil(deepest / 12), showgrid: false });
    const values = axis(measure.axis, { type: measure.log ? "log" : "linear", range: [low, high], tickvals: marks.map(([, v]) => v), ticktext: marks.map(([, v]) => written(v)) });
    return [found, layout(depth, values)];
  }

  function ends(measure) {
    const at = finite(measure, (map) => map.profiles.flatMap((one) => one.values)).map((value) => placed(measure, value));
    const low = at.reduce((a, b) => Math.min(a, b), Infinity), high = at.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low > high) return [-1, 1];
    const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.5;
    return [low - room, high + room];
  }

  function byDepth() {
    const select = $("measure");
    data.measures.forEach((measure, k) => select.append(node("option", { value: k }, measure.title)));
    const show = () => {
      const measure = data.measures[select.value];
      const gradient = measure.name.startsWith("grad_norm/");
      $("blocks-how").textContent = `${measure.title}, the mean over the runs of a group.` +
        (gradient ? " It says how strongly each block is trained: a flat profile trains all alike, a steep one favours one end of the network." : "") +
        (data.unmapped ? ` For ${data.unmapped} further measures there is no room here.` : "");
      $("blocks-title").textContent = `${measure.kind} by depth`;
      clear($("profiles"));
      const names = ["First logged step", "Middle of the run", "Last logged step"], [bottom, top] = ends(measure);
      const same = (a, b) => measure.maps.every((map) => map.profiles[a].step === map.profiles[b].step);
      [0, 1, 2].filter((at) => !(at === 1 && (same(0, 1) || same(1, 2))) && !(at === 2 && same(0, 2))).forEach((at) => {
        const steps = new Set(measure.maps.map((map) => map.profiles[at].step));
        const note = steps.size === 1 ? `step ${[...steps][0].toLocaleString("en")}` : "";
        chart($("profiles"), names[at], 300, () => profile(measure, at, bottom, top), note);
      });
      const [low, high] = spanned(measure);
      scale($("scale"), measure, low, high);
      clear($("maps"));
      for (const map of measure.maps) {
        const group = data.groups[map.group];
        const note = group.runs > 1 ? `mean of ${group.runs} runs` : "";
        const figure = chart($("maps"), short(group.label), Math.min(360, 150 + 12 * map.blocks.length), () => heat(map, measure, low, high), note);
        figure.dataset.group = map.group;
      }
      toggled();
    };
    select.addEventListener("change", show);
    show();
  }

  function matrices() {
    for (const one of data.matrices) {
      const group = data.groups[one.group], tasks = one.cells.map((_, k) => String(k + 1));
      const note = one.runs > 1 ? `mean of ${one.runs} runs` : "";
      const figure = chart($("matrices"), short(group.label), Math.min(420, 110 + 42 * tasks.length), () => {
        const text = one.cells.map((row) => row.map((cell) => (typeof cell === "number" ? cell.toFixed(tasks.length > 8 ? 0 : 1) : "")));
        const trace = {
          type: "heatmap", x: tasks, y: tasks, z: one.cells, text, zmin: 0, zmax: 100, colorscale: MAP, showscale: false, hoverongaps: false,
          texttemplate: tasks.length <= 12 ? "%{text}" : "", hovertemplate: "task %{x} after training task %{y}: %{z:.2f} %<extra></extra>",
        };
        const down = { type: "category", autorange: "reversed", showgrid: false, dtick: Math.ceil(tasks.length / 12) };
        return [[trace], layout(axis("accuracy on task (%)", { type: "category", showgrid: false, dtick: down.dtick }), axis("after training task", down))];
      }, note);
      figure.dataset.group = one.group;
    }
  }

  // --- the legend, for all charts --------------------------------------------------------------------------------

  function toggled() {
    for (const figure of document.querySelectorAll("figure[data-group]")) figure.hidden = off(Number(figure.dataset.group));
  }

  function key(number, label, shade, stroke) {
    const button = node("button", { type: "button", "aria-pressed": "true", title: label });
    const pattern = { solid: "", dash: "5 3", dot: "2 3" }[stroke];
    button.innerHTML = `<svg width="26" height="10" aria-hidden="true"><line x1="1" x2="25" y1="5" y2="5" stroke-width="3" stroke-dasharray="${pattern}"/></svg>`;
    button.querySelector("line").style.stroke = `var(${shade})`;
    button.append(node("span", {}, short(label)));
    button.addEventListener("click", () => {
      if (!hidden.delete(number)) hidden.add(number);
      button.setAttribute("aria-pressed", String(!hidden.has(number)));
      toggled();
      redraw();
    });
    $("legend").append(button);
  }

  function legend() {
    const shown = data.groups.map((group, k) => [group, k]).filter(([group]) => named(group));
    shown.sort((a, b) => a[0].colour - b[0].colour);
    for (const [group, k] of shown) key(k, group.label, `--c${group.colour % COLOURS}`, dash(group));
    const rest = data.groups.length - shown.length;
    if (rest) key(-1, `${rest} further groups, behind these ${shown.length}`, "--others", "solid");
  }

  // --- tables ----------------------------------------------------------------------------------------------------

  function sort(table, column, head) {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.key ?? "";
    const number = (text) => (text === "" || text === "nan" ? NaN : Number(text.replace(/^(-?)inf$/, "$1Infinity")));
    const rows = [...table.tBodies[0].rows].map((row) => [row, value(row), number(value(row))]);
    const numeric = rows.every(([, text, as]) => text === "" || text === "nan" || !Number.isNaN(as));
    rows.sort(([, a, x], [, b, y]) => {
      if (!numeric) return (down ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what has no number stands last
      return (down ? -1 : 1) * (x - y);
    });
    table.tBodies[0].append(...rows.map(([row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable"))
    table.querySelectorAll("th").forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(table, column, head)));

  // --- all of it -------------------------------------------------------------------------------------------------

  const parts = { loss: [data.losses, losses], blocks: [data.measures, byDepth], accuracy: [data.matrices, matrices], series: [data.series, others] };
  offerBands();
  if (data.groups.length > 1) legend();
  else $("legend").remove();
  for (const [id, [has, make]] of Object.entries(parts)) {
    if (has.length) make();
    else {
      $(id).hidden = true;
      document.querySelector(`nav a[href="#${id}"]`).remove();
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.documentElement.dataset.ready = "true";
})();
