// The page: reads the data, and puts the views of the chosen runs below each other.

const OTHER = "other";
let data = null, chosen = [];

const runBadge = (index) => el("span", { class: "badge", style: `--mine: var(--run-${index % 6})`, "aria-hidden": "true" }, String.fromCharCode(65 + index));
const several = () => chosen.length > 1;
const runsShown = () => chosen.map((index) => [data.runs[index], index]);

// Modules by layer (rows, the network's output first) and type (groups); rare types share a group.
function cellsOf(run) {
  if (run.cells) return run.cells;
  const layers = [...new Set(run.modules.map((module) => module.block))].sort((a, b) => b - a);
  const types = [...new Set(run.modules.map((module) => module.type))];
  if (layers.length < 2) {
    run.cells = { rows: types, groups: [""], lookup: types.map((type) => [indices(run, (module) => module.type === type)]) };
    return run.cells;
  }
  const spread = (type) => new Set(run.modules.filter((module) => module.type === type).map((module) => module.block)).size;
  const common = types.filter((type) => spread(type) > 1);
  const rare = types.filter((type) => !common.includes(type));
  const groups = common.length ? [...common, ...(rare.length ? [OTHER] : [])] : types;
  const group = (module) => groups.indexOf(groups.includes(module.type) ? module.type : OTHER);
  const lookup = layers.map(() => groups.map(() => []));
  run.modules.forEach((module, index) => lookup[layers.indexOf(module.block)][group(module)].push(index));
  const name = (layer) => {
    const inside = run.modules.filter((module) => module.block === layer);
    const layered = inside.find((module) => module.layer);
    return layered ? layered.layer : inside[0].type;
  };
  run.cells = { rows: layers.map(name), groups, lookup };
  return run.cells;
}

const indices = (run, holds) => run.modules.map((_, index) => index).filter((index) => holds(run.modules[index]));

function cellName(run, inside, row, group) {
  if (inside.length === 1) {
    const module = run.modules[inside[0]];
    return module.count > 1 ? `${module.name} (mean of ${module.count} modules)` : module.label;
  }
  return `${row} ${group} (${inside.length} modules)`;
}

// The ranks that were in force, from which step on, and the decision that made them.
function rankHistory(run) {
  const changes = run.decisions.map((decision) => ({ step: decision.step, ranks: decision.after, decision: decision.number }));
  if (changes.length && changes[0].step > 0) changes.unshift({ step: 0, ranks: run.decisions[0].before, decision: null });
  return changes;
}

function rankMap(run, runIndex, end) {
  const { rows, groups, lookup } = cellsOf(run), history = rankHistory(run);
  const stops = [...history.map((change) => change.step), run.steps], widths = history.map((_, index) => stops[index + 1] - stops[index]);
  if (end > run.steps) widths.push(end - run.steps);
  const present = (row, group, column) => (history[column] ? lookup[row][group].filter((index) => known(history[column].ranks[index])) : []);
  const value = (row, group, column) => {
    const inside = present(row, group, column);
    return inside.length ? inside.reduce((sum, index) => sum + history[column].ranks[index], 0) / inside.length : null;
  };
  const describe = (row, group, column) => {
    if (!history[column]) return `the run ended at step ${run.steps}`;
    const inside = present(row, group, column);
    if (!inside.length) return `${rows[row]}, ${groups[group] || "all"}: no module`;
    const ranks = inside.map((index) => history[column].ranks[index]), low = Math.min(...ranks), high = Math.max(...ranks);
    const rank = low === high ? `rank ${rankText(low)}` : `mean rank ${rankText(value(row, group, column))}, ${rankText(low)} to ${rankText(high)}`;
    return `${cellName(run, inside, rows[row], groups[group])}: ${rank}, steps ${stops[column]} to ${stops[column + 1]}`;
  };
  return heatMap({
    label: `Ranks of ${run.name} over the steps. Arrow keys move between layers and steps, Enter opens the decision.`,
    rows, groups: groups.map((name) => ({ name, widths })), value, text: describe, least: 96, widest: groups.length > 1 ? 260 : Infinity, tallest: 22,
    marked: (row, group, column) => column === 0 || value(row, group, column) !== value(row, group, column - 1),
    foot: ["0", `step ${end}`], ticks: history.length <= 16 ? history.map((change, index) => (known(change.decision) ? index : -1)).filter((index) => index >= 0) : [],
    enter: (row, group, column) => history[column] && known(history[column].decision) && openDecision(runIndex, history[column].decision),
  });
}

function verdictView() {
  const cards = runsShown().map(([run, index]) => {
    const lead = run.results[0] || run.sentences.losses || run.sentences.costs || "";
    const rest = [...run.results.slice(1), run.sentences.ranks, run.sentences.costs].filter((sentence) => sentence && sentence !== lead);
    return el("article", { class: "run", style: `--mine: var(--run-${index % 6})` },
      data.runs.length > 1 ? el("h3", { class: "runname" }, runBadge(index), run.name) : null,
      data.runs.some((other) => other.subject !== run.subject) && run.subject ? el("p", { class: "faint" }, run.subject) : null,
      run.warnings.map((sentence) => el("p", { class: "warning" }, el("strong", {}, "Warning. "), sentence)),
      run.caveats.map((sentence) => el("p", { class: "warning caveat" }, sentence)),
      lead ? el("p", { class: "lead" }, ending(lead)) : null,
      tiles(run), rest.map((sentence) => el("p", {}, ending(sentence))),
      run.left_out.length ? el("p", { class: "note" }, `Not shown on this page: ${run.left_out.join("; ")}.`) : null);
  });
  const aggregated = data.by_type ? el("p", { class: "note" }, "The log is long, so modules are grouped by type; ranks are averages over the modules of a type.") : null;
  return el("section", { class: "card", id: "verdict" }, el("h2", {}, "Verdict"),
    el("div", { class: "side" }, cards, several() ? null : resultTable()), aggregated, several() ? resultTable() : null);
}

const ending = (sentence) => (/[.!?]$/.test(sentence) ? sentence : `${sentence}.`);

// The figures that matter most, each beside the same of the uniform run if there is one.
function tiles(run) {
  const rows = run.table.rows.filter((row) => ["held-out loss", "held-out accuracy", "peak memory", "adapted modules", "median step"].includes(row.label));
  const shown = rows.map((row) => [row.label, row.cells[0], run.table.columns[1] ? `${run.table.columns[1]} ${row.cells[1]}` : ""]);
  const last = run.decisions[run.decisions.length - 1];
  if (!rows.length && last) {
    const ranks = last.after.filter(known), mean = ranks.reduce((sum, rank) => sum + rank, 0) / ranks.length;
    if (!data.by_type) shown.push(["adapted modules", String(ranks.filter((rank) => rank > 0).length), `of ${ranks.length}`], ["mean rank", number(mean), ""]);
    shown.push([run.predicted_of, costText(last.predicted_cost, run.unit), ""], ["decisions", String(run.decisions.length), ""]);
  }
  if (known(run.energy_joules)) shown.push(["energy", `${number(run.energy_joules / 1000)} kJ`, "measured"]);
  return shown.length ? el("dl", { class: "tiles" }, shown.map(([name, value, more]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null)))) : null;
}

// The results of all chosen runs, a column for each run of each folder; bold is best in its folder.
function resultTable() {
  const columns = runsShown().flatMap(([run, index]) => run.table.columns.map((name, place) => ({ run, index, name, place })));
  const labels = [...new Set(columns.flatMap(({ run }) => run.table.rows.map((row) => row.label)))];
  if (!labels.length) return null;
  const cell = (label) => ({ run, place }) => {
    const row = run.table.rows.find((each) => each.label === label);
    return el("td", { class: "figure" }, row ? (row.best.includes(place) ? el("b", {}, row.cells[place]) : row.cells[place]) : "–");
  };
  const head = ({ run, index, name }) => el("th", { scope: "col", class: "figure" }, data.runs.length > 1 ? [runBadge(index), ` ${run.name}: `] : null, name);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Results" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "result"), columns.map(head))),
    el("tbody", {}, labels.map((label) => el("tr", {}, el("th", { scope: "row" }, label), columns.map(cell(label)))))));
}

function ranksView() {
  const shown = runsShown().filter(([run]) => run.decisions.length), end = Math.max(1, ...shown.map(([run]) => run.steps));
  if (!shown.length) return null;
  const top = Math.max(...shown.flatMap(([run]) => run.decisions.map((decision) => Math.max(...decision.after.filter(known), 0))));
  const maps = shown.map(([run, index]) => el("div", {}, several() ? el("h3", { class: "runname" }, runBadge(index), run.name) : null,
    el("p", { class: "finding" }, run.sentences.ranks), rankMap(run, index, end)));
  return el("section", { class: "card", id: "ranks" }, el("h2", {}, "Where the rank went"), rankKey(top),
    el("p", { class: "note" }, data.by_type ? "One row per module type; steps from left to right. "
      : "A panel for each type of module, a row for each layer, the network's output at the top; steps from left to right, a triangle at each decision. ",
      "Hover over a cell or use the arrow keys; Enter opens the decision."), el("div", { class: "side" }, maps));
}

// A curve's dashes are those of its part in the run; so is its colour, or else that of its run where there are several.
function styleOf(index, name) {
  const part = Math.max(0, ["rankpilot", "uniform", "all-linear"].indexOf(name)), one = data.runs.length === 1;
  return { color: () => runColor(one ? part : index), dash: part, label: one ? name : `${data.runs[index].name}: ${name}` };
}

const marksOf = () => runsShown().flatMap(([run, index]) => run.decisions.map((decision) => ({
  step: decision.step, label: several() ? `${String.fromCharCode(65 + index)}${decision.number}` : String(decision.number),
}))).sort((a, b) => a.step - b.step);

const lastStep = () => Math.max(1, ...runsShown().map(([run]) => run.steps));

function thinned(curves, what) {
  const each = Math.max(1, ...curves.filter(Boolean).map((curve) => curve.each || 1));
  return each > 1 ? `Each point is the ${what} of ${each} logged ones. ` : "";
}

function lossesView() {
  const parts = [["train", "Training loss"], ["held_out", "Held-out loss"]].map(([part, title]) => {
    const curves = runsShown().flatMap(([run, index]) => Object.entries(run.losses).map(([name, losses]) => ({ index, name, curve: losses[part] }))).filter(({ curve }) => curve);
    const series = curves.flatMap(({ index, name, curve }) => {
      const style = styleOf(index, name);
      return lossSeries(style.label, style.color, style.dash, curve, part === "held_out");
    });
    if (!series.length) return null;
    const range = usualRange(curves.flatMap(({ curve }) => curve.y));
    return chart({
      title, label: `${title} over the steps, decisions marked`, series, steps: lastStep(), marks: marksOf(), range,
      text: (value) => fixed(value, 4), axis: (value) => number(value, 3), note: thinned(curves.map(({ curve }) => curve), "mean"),
    });
  }).filter(Boolean);
  parts.push(...runsShown().filter(([run]) => Object.keys(run.race).length).map(([run]) => raceChart(run)));
  if (!parts.length) return null;
  const findings = runsShown().map(([run]) => run.sentences.losses).filter(Boolean);
  return el("section", { class: "card", id: "losses" }, el("h2", {}, "Loss"), several() ? null : findings.map((finding) => el("p", { class: "finding" }, ending(finding))),
    el("div", { class: "side" }, parts), el("p", { class: "note" }, marksOf().length > MOST_MARKS ? "There are too many decisions to mark." : "Dotted lines: decisions."));
}

function raceChart(run) {
  const rates = Object.entries(run.race), curves = rates.map(([, curve]) => curve), title = "Learning rates in the race";
  const series = rates.map(([rate, curve], place) => ({ name: rate, color: () => runColor(place), dash: place % DASHES.length, curve, kind: "line" }));
  return chart({
    title: several() ? `${title}: ${run.name}` : title, label: `Training loss of each rate in the race`, series, steps: Math.max(...curves.flatMap(({ x }) => x)), marks: [],
    range: usualRange(curves.flatMap(({ y }) => y)), text: (value) => fixed(value, 4), axis: (value) => number(value, 3), note: "All rates saw the same batches.",
  });
}

function costSeries(run, index) {
  const style = (name) => styleOf(index, name), prefix = data.runs.length > 1 ? `${run.name}: ` : "", series = [];
  if (run.predicted) series.push({ name: `${prefix}${run.predicted_of}`, color: () => (data.runs.length > 1 ? runColor(index) : cssColor("--ink")), dash: 0, curve: untilEnd(run.predicted, run.steps), kind: "stairs" });
  if (run.budgets) series.push({ name: `${prefix}budget`, color: () => cssColor("--limit"), dash: 3, curve: untilEnd({ x: [0, ...run.budgets.x.slice(1)], y: run.budgets.y }, run.steps), kind: "stairs" });
  for (const [name, curve] of Object.entries(run.peaks)) series.push({ name: `${style(name).label}, measured`, color: style(name).color, dash: style(name).dash, curve, kind: "points" });
  return series;
}

function costsView() {
  const units = [...new Set(runsShown().map(([run]) => run.unit))];
  const charts = units.map((unit) => {
    const series = runsShown().filter(([run]) => run.unit === unit).flatMap(([run, index]) => costSeries(run, index));
    if (!series.length) return null;
    const values = series.flatMap(({ curve }) => curve.y).filter(known), top = Math.max(...values);
    const scale = unit === "bytes" ? byteScale(top) : { name: unit, size: 1 };
    const scaled = series.map((each) => ({ ...each, curve: { ...each.curve, y: each.curve.y.map((value) => (known(value) ? value / scale.size : null)) } }));
    const low = Math.min(...values) / scale.size, high = top / scale.size;
    const pad = Math.max(0.18 * (high - low), 0.0005 * high);
    const start = low < 0.4 * high ? 0 : low - pad, title = unit === "bytes" ? `Peak per step (${scale.name})` : "Adapter parameters";
    return chart({
      title, label: `${title} against the budget over the steps`, series: scaled, steps: lastStep(), marks: marksOf(), range: [start, high + pad],
      text: (value) => (known(value) ? costText(value * scale.size, unit) : "–"), axis: (value) => number(value, 4),
      note: thinned(series.map(({ curve }) => curve), "highest") + (start ? "The axis does not start at zero." : ""),
    });
  }).filter(Boolean);
  const time = timeChart();
  if (!charts.length && !time) return null;
  const findings = runsShown().map(([run]) => run.sentences.costs).filter(Boolean);
  const title = units.includes("bytes") ? "Memory" : "Parameters";
  return el("section", { class: "card", id: "costs" }, el("h2", {}, time ? `${title} and time` : title), several() ? null : findings.map((finding) => el("p", { class: "finding" }, ending(finding))),
    el("div", { class: "side" }, charts, time), runsShown().map(([run, index]) => saversTable(run, index)));
}

// What exact savers bring to a step of plain LoRA, where they lower its peak.
function saversTable(run, index) {
  if (!run.savers.length) return null;
  const [head, ...rows] = run.savers;
  return el("div", {}, several() ? el("h3", { class: "runname" }, runBadge(index), run.name) : null, el("p", { class: "finding" }, "Same losses in less memory: plain LoRA, rank 8 on all modules."),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Exact savers" }, el("table", {},
      el("thead", {}, el("tr", {}, head.map((name, place) => el("th", { scope: "col", class: place ? "figure" : null }, name)))),
      el("tbody", {}, rows.map(([name, ...peaks]) => el("tr", {}, el("th", { scope: "row" }, name), peaks.map((peak) => el("td", { class: "figure" }, peak))))))));
}

function timeChart() {
  const series = runsShown().flatMap(([run, index]) => {
    return Object.entries(run.step_seconds).map(([name, curve]) => {
      const style = styleOf(index, name);
      return { name: style.label, color: style.color, dash: style.dash, curve, kind: "line" };
    });
  });
  if (!series.length) return null;
  const [, high] = usualRange(series.flatMap(({ curve }) => curve.y));
  return chart({
    title: "Step time (ms)", label: "Median step time", series, steps: lastStep(), marks: marksOf(), range: [0, high],
    text: (value) => (known(value) ? `${number(1000 * value)} ms` : "–"), axis: (value) => number(1000 * value), note: thinned(series.map(({ curve }) => curve), "median"),
  });
}

function decisionsView() {
  const shown = runsShown().filter(([run]) => run.decisions.length);
  if (!shown.length) return null;
  return el("section", { class: "card", id: "decisions" }, el("h2", {}, "Decisions"), el("p", { class: "note" }, "Click or press Enter to open one; arrow keys move between them."),
    el("div", { onkeydown: walkDecisions }, shown.map(([run, index]) => decisionList(run, index, several()))));
}

function settingsView() {
  const shown = runsShown().filter(([run]) => Object.keys(run.settings).length);
  const names = [...new Set(shown.flatMap(([run]) => Object.keys(run.settings)))];
  if (!names.length) return null;
  const cell = (name) => ([run]) => {
    const differs = new Set(shown.map(([other]) => other.settings[name])).size > 1;
    return el("td", {}, differs ? el("b", {}, run.settings[name] ?? "–") : run.settings[name] ?? "–");
  };
  const head = shown.length > 1 ? el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "setting"), shown.map(([run, index]) => el("th", { scope: "col" }, runBadge(index), ` ${run.name}`)))) : null;
  return el("section", { class: "card", id: "settings" }, el("h2", {}, "Settings"), el("details", {}, el("summary", {}, `${names.length} settings`),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Settings" }, el("table", {}, head, el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, words(name)), shown.map(cell(name)))))))));
}

function selector() {
  if (data.runs.length < 2) return null;
  const box = (run, index) => {
    const input = el("input", { type: "checkbox", onchange: () => choose(index, input) });
    input.checked = chosen.includes(index);
    return el("label", {}, input, runBadge(index), run.name);
  };
  return el("fieldset", { class: "runs" }, el("legend", {}, "Runs side by side"), data.runs.map(box));
}

function choose(index, input) {
  const next = input.checked ? [...chosen, index].sort((a, b) => a - b) : chosen.filter((other) => other !== index);
  if (next.length) { chosen = next; show(); } else input.checked = true;  // one run at least
}

// How plain PEFT loads what came out, and how it is exported.
function adapterView() {
  const shown = runsShown().filter(([run]) => run.adapter);
  if (!shown.length) return null;
  const code = (label, text) => el("pre", { tabindex: 0, role: "region", "aria-label": label }, text);
  return el("section", { class: "card", id: "adapter" }, el("h2", {}, "The adapter"), shown.map(([{ name, adapter }, index]) => el("div", {},
    several() ? el("h3", { class: "runname" }, runBadge(index), name) : null,
    el("p", {}, "It is saved in ", el("code", {}, adapter.folder), "; its base model is ", el("code", {}, adapter.base), ". Plain PEFT loads it:"),
    code("How to load the adapter", adapter.load),
    el("p", {}, "For vLLM and llama.cpp, which need one rank for all modules, and for a new fine-tune at the learned ranks:"),
    code("How to export the adapter", adapter.export))));
}

const VIEWS = [["verdict", "Verdict", verdictView], ["ranks", "Ranks", ranksView], ["losses", "Loss", lossesView], ["costs", null, costsView],
  ["decisions", "Decisions", decisionsView], ["adapter", "Adapter", adapterView], ["settings", "Settings", settingsView]];

function show() {
  repaints.clear();
  const views = VIEWS.map(([id, name, make]) => [id, name, make()]).filter(([, , view]) => view);
  document.getElementById("main").replaceChildren(...views.map(([, , view]) => view));
  const link = ([id, name, view]) => el("a", { href: `#${id}` }, name || view.querySelector("h2").textContent);
  document.getElementById("sections").replaceChildren(...views.map(link));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
  for (const repaint of repaints) repaint();
}

// The data of the page: JSON, gzipped, as base64.
async function unpack(text) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old. Use Chrome 80, Firefox 113, Safari 16.4 or newer.");
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function start() {
  try {
    const system = matchMedia("(prefers-color-scheme: dark)"), button = document.getElementById("theme");
    let own = false;
    setTheme(system.matches ? "dark" : "light");
    system.addEventListener("change", () => { if (!own) setTheme(system.matches ? "dark" : "light"); });
    button.addEventListener("click", () => { own = true; setTheme(isDark() ? "light" : "dark"); });
    data = await unpack(document.getElementById("data").textContent);
    palette = data.palette;
    chosen = data.runs.map((_, index) => index).slice(0, 4);
    const picker = selector();
    if (picker) document.querySelector("header").append(picker);
    show();
    const subjects = [...new Set(data.runs.map((run) => run.subject).filter(Boolean))];
    const title = subjects.length === 1 ? subjects[0] : data.runs.map((run) => run.name).join(", ");
    document.getElementById("title").textContent = title;
    document.title = `${title} – rankpilot study`;
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    document.getElementById("title").textContent = `Cannot show this page: ${error.message}`;
  }
}

start();
