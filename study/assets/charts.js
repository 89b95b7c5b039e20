// Curves over the steps of a run, drawn by uPlot: lines, points and stairs, with decisions marked.

// The middle part of a curve with a few spikes: one of them must not flatten all else.
function usualRange(values) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const low = sorted[0], high = sorted.length < 20 ? at(1) : Math.min(at(1), 2 * at(0.99) - at(0.5));
  const pad = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - pad, high + pad];
}

function smoothed(curve) {
  const span = Math.max(1, Math.floor(curve.y.length / 12)), decay = 1 - 2 / (span + 1);
  let total = 0, weight = 0;
  const y = curve.y.map((value) => {
    if (!known(value)) return null;
    total = decay * total + value;
    weight = decay * weight + 1;
    return total / weight;
  });
  return { x: curve.x, y };
}

// A stair needs its last value once more, where the run ends.
function untilEnd(curve, steps) {
  const last = curve.x.length - 1;
  if (curve.x[last] >= steps) return curve;
  return { x: [...curve.x, steps], y: [...curve.y, curve.y[last]] };
}

const FEW_POINTS = 24;

// A training loss of many points is drawn thin, and smoothed on top of it.
function lossSeries(name, color, dash, curve, held) {
  if (held || curve.y.length < FEW_POINTS) return [{ name, color, dash, curve, kind: "dotted" }];
  return [
    { name: "", color, dash: 0, curve, kind: "faint" },
    { name: `${name} (smoothed)`, color, dash, curve: smoothed(curve), kind: "line" },
  ];
}

// Where the values of an axis are so close that their short labels are the same, plain numbers get more digits.
function axisLabels(splits, format) {
  const labels = splits.map(format);
  if (new Set(labels).size === labels.length || labels.some((label) => /[a-z]/i.test(label))) return labels;
  return splits.map((value) => String(Number(value.toPrecision(6))));
}

function uplotSeries(series) {
  const stroke = series.color(), dash = DASHES[series.dash || 0];
  const common = { stroke, dash, spanGaps: true, scale: "y", points: { show: series.curve.x.length === 1, size: 5, fill: stroke } };
  if (series.kind === "points") return { ...common, paths: () => null, points: { show: true, size: 5, fill: series.dash ? cssColor("--paper") : stroke } };
  if (series.kind === "dotted") return { ...common, width: 2, points: { show: true, size: 6, fill: stroke } };
  if (series.kind === "stairs") return { ...common, width: series.width || 2, paths: uPlot.paths.stepped({ align: 1 }) };
  return series.kind === "faint" ? { ...common, width: 1, alpha: 0.3 } : { ...common, width: 2.5 };
}

function swatch(series) {
  const stroke = series.color(), line = { x1: 1, x2: 25, y1: 6, y2: 6, stroke, "stroke-width": 2.5 };
  if (series.dash && series.kind !== "points") line["stroke-dasharray"] = DASHES[series.dash].join(" ");
  const dot = ["points", "dotted"].includes(series.kind) ? svg("circle", { cx: 13, cy: 6, r: 3.5, stroke, fill: series.dash && series.kind === "points" ? "none" : stroke }) : null;
  return svg("svg", { width: 26, height: 12, "aria-hidden": "true" }, series.kind === "points" ? null : svg("line", line), dot);
}

const MOST_MARKS = 60;

// Decisions as dotted lines, a triangle above each, and their numbers where there is room; very many are not drawn.
function drawMarks(u, marks) {
  const context = u.ctx, ratio = window.devicePixelRatio || 1, { top, height } = u.bbox;
  context.save();
  context.font = `${11 * ratio}px system-ui, sans-serif`;
  context.textAlign = "center";
  let previous = -Infinity;
  for (const mark of marks.length > MOST_MARKS ? [] : marks) {
    const x = u.valToPos(mark.step, "x", true);
    context.strokeStyle = context.fillStyle = cssColor("--faint");
    context.globalAlpha = marks.length > 40 ? 0.25 : 0.9;
    context.lineWidth = ratio;
    context.setLineDash([2 * ratio, 3 * ratio]);
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, top + height);
    context.stroke();
    context.beginPath();
    context.moveTo(x - 4 * ratio, top - 6 * ratio);
    context.lineTo(x + 4 * ratio, top - 6 * ratio);
    context.lineTo(x, top);
    context.fill();
    if (x - previous > 24 * ratio) {
      context.globalAlpha = 1;
      context.fillText(mark.label, x, top - 11 * ratio);
      previous = x;
    }
  }
  context.restore();
}

/* spec: title, label (what it shows, for those who do not see it), series [{ name, color(), dash, curve, kind }], steps,
   marks [{ step, label }], text(value), axis(value), range [low, high], note. */
function chart(spec) {
  const legend = el("ul", { class: "legend" }), where = el("p", { class: "where", "aria-live": "polite" });
  const named = spec.series.filter((series) => series.name);
  const table = uPlot.join(spec.series.map(({ curve }) => [curve.x, curve.y]));
  let u = null, drawn = null;

  // The values at a step, or those before it where a curve has none there.
  function tell(index) {
    const at = index === null ? table[0].length - 1 : index;
    where.textContent = `${index === null ? "at the end, step" : "at step"} ${number(table[0][at], 6)}`;
    legend.replaceChildren(...named.map((series) => {
      const column = table[1 + spec.series.indexOf(series)];
      let place = at;
      while (place > 0 && !known(column[place])) place -= 1;
      return el("li", {}, swatch(series), el("span", {}, series.name), el("b", {}, spec.text(column[place])));
    }));
  }

  const axis = (more) => ({
    stroke: cssColor("--faint"), font: "11px system-ui, sans-serif", grid: { stroke: cssColor("--rule"), width: 1 },
    ticks: { stroke: cssColor("--rule"), width: 1, size: 4 }, ...more,
  });
  const host = responsive({ class: "plot" }, (width) => {
    if (u) u.destroy();
    drawn = el("div", {});
    tell(null);
    u = new uPlot({
      width, height: Math.max(210, Math.min(300, Math.round(width * 0.45))), legend: { show: false }, padding: [26, 12, 0, 0],
      scales: { x: { time: false, range: () => [0, spec.steps] }, y: { range: () => spec.range } },
      series: [{}, ...spec.series.map(uplotSeries)],
      axes: [
        axis({ incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000], size: 26, label: "training step", labelSize: 18, labelFont: "12px system-ui, sans-serif" }),
        axis({ size: 62, values: (_, splits) => axisLabels(splits, spec.axis) }),
      ],
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "steps", scales: ["x", null] } },
      hooks: { draw: [(self) => drawMarks(self, spec.marks)], setCursor: [(self) => tell(self.cursor.idx ?? null)] },
    }, table, drawn);
    return drawn;
  });
  const walk = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (!move || !u) return;
    event.preventDefault();
    const last = table[0].length - 1, now = u.cursor.idx ?? (move < 0 ? last + 1 : -1);
    const index = Math.max(0, Math.min(last, now + move));
    u.setCursor({ left: u.valToPos(table[0][index], "x"), top: 10 });
  };
  return el("div", { class: "chart", tabindex: 0, role: "group", "aria-label": `${spec.label}. Left and right keys walk over the steps.`, onkeydown: walk },
    el("p", { class: "caption" }, spec.title), host, el("div", { class: "under" }, where, legend), spec.note ? el("p", { class: "note" }, spec.note) : null);
}
