// The page of a policy over a suite: the verdict, what drives it, promise against result, and the runs that went wrong.

const several = () => false;  // parts of a run stand one level below it
const share = (value) => `${Math.round(100 * value)} %`;
const change = (value) => (value > 0 ? "+" : "") + fixed(value, 2);
const between = (figure, form) => (figure ? `${form(figure.low)} to ${form(figure.high)}` : "");
const paragraphs = (sentences) => sentences.filter(Boolean).map((sentence) => el("p", {}, sentence));
const card = (id, title, ...content) => el("section", { class: "card", id }, el("h2", {}, title), content);

// rows [{ name, value, low, high, nothing, mark, text, more }]: a bar from 0, its interval as a line, a diamond at the mark.
// Where a screen is narrow, the words stand above the bar.
function intervalBars(label, rows, form, reach = []) {
  const all = [0, ...reach, ...rows.flatMap((row) => [row.value, row.low, row.high, row.mark]).filter(known)];
  const low = Math.min(...all), high = Math.max(...all);
  return responsive({ class: "evidence" }, (width) => {
    const narrow = width < 620, named = narrow ? 0 : Math.min(300, 0.34 * width), told = narrow ? 0 : 250, tall = narrow ? 46 : 28;
    const place = (value) => named + 10 + ((value - low) / (high - low || 1)) * (width - named - told - 20);
    const height = tall * rows.length + 4, zero = place(0);
    const drawn = rows.map((row, index) => {
      const y = tall * index + (narrow ? 20 : 3), line = narrow ? y - 5 : y + 15, end = place(row.value);
      const shown = form(row.value);
      return [
        narrow ? cutText(2, line, "start", "name", row.name, width - 90) : cutText(named, line, "end", "name", row.name, named),
        svg("rect", { x: Math.min(zero, end), y: y + 1, width: Math.max(1, Math.abs(end - zero)), height: 18, rx: 2,
          class: `bar${row.value < 0 ? " below" : ""}${row.nothing ? " nothing" : ""}` }, svg("title", {}, barInWords(row, form))),
        known(row.low) ? ["halo", "whisker"].map((name) => svg("line", { x1: place(row.low), x2: place(row.high), y1: y + 10, y2: y + 10, class: name })) : null,
        known(row.mark) ? svg("path", { d: `M${place(row.mark)} ${y + 3}l7 7l-7 7l-7 -7z`, class: "bound" }) : null,
        narrow ? text(width - 2, line, "end", "name", shown) : text(width - told + 8, line, "start", "name", shown),
        narrow ? null : cutText(width - 2, line, "end", "faint", row.nothing ? "decides nothing" : row.more || "", told - 70),
      ];
    });
    const words = `${label}: ${rows.map((row) => barInWords(row, form)).join("; ")}`;
    return picture(words, width, height, svg("line", { x1: zero, x2: zero, y1: 0, y2: height, class: "zero" }), drawn);
  });
}

function barInWords(row, form) {
  const interval = known(row.low) ? `, 95 % interval ${between(row, form)}${row.nothing ? ", which decides nothing" : ""}` : "";
  return `${row.name} ${form(row.value)}${interval}${row.more ? `, ${row.more}` : ""}`;
}

// What the bars show, in words and digits.
function barTable(label, first, rows, form, others = []) {
  const columns = [
    { name: first, value: (row) => row.name, wide: true, order: (row) => rows.indexOf(row) },
    { name: "figure", value: (row) => row.value, text: form },
    { name: "95 % interval", value: (row) => (known(row.low) ? `${between(row, form)}${row.nothing ? ": decides nothing" : ""}` : "one task: none"), order: (row) => row.low },
    ...others,
  ];
  return el("details", {}, el("summary", {}, "The same as a table"), sortable(label, columns, rows));
}

const key = (...signs) => el("p", { class: "note signs" }, signs.map(([shape, meaning]) => el("span", {},
  svg("svg", { width: 18, height: 14, "aria-hidden": "true" }, shape), meaning)));
const whiskerSign = () => [svg("line", { x1: 0, x2: 18, y1: 7, y2: 7, class: "whisker" }), "95 % interval"];
const nothingSign = () => [svg("rect", { x: 1, y: 2, width: 15, height: 10, rx: 2, class: "bar nothing" }), "decides nothing: the interval holds 0"];

function verdictCard(data) {
  const [lead, ...others] = data.sentences.verdict;
  const tile = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, more)));
  return card("verdict", "Verdict", el("p", { class: "lead" }, lead),
    el("dl", { class: "tiles" },
      tile("gain, of the headroom", change(data.improvement.value), between(data.improvement, change)),
      tile("runs that gain", share(data.gained.value), between(data.gained, share)),
      tile("leaves uniform rank", share(data.leaves_uniform.value), between(data.leaves_uniform, share)),
      data.moves_later ? tile("later decisions that move", share(data.moves_later.value), between(data.moves_later, share)) : null),
    paragraphs(others),
    el("p", { class: "note" }, "The headroom is the gap between the held-out losses of uniform rank and of the best known plan. Below each figure is its 95 % interval over tasks."));
}

function driversCard({ drivers, sentences }) {
  if (!drivers.length) return card("drivers", "What drives it", el("p", {}, sentences.obstacle || "Its first decisions had one plan each."));
  const rows = drivers.map(({ name, size, mean }) => ({ name: words(name), ...size, more: `adds ${change(mean)} on the mean`, mean }));
  return card("drivers", "What drives it",
    el("p", {}, "How much each group of features moves the lower bound of the first plan over uniform rank, whether up or down: mean size of its Shapley value. What it adds on the mean is small where it speaks for some plans and against others."),
    intervalBars("Mean size of what each group adds", rows, fixed), key(whiskerSign()),
    barTable("What each group adds", "group", rows, fixed, [{ name: "adds on the mean", value: (row) => row.mean, text: plus }]),
    el("p", { class: "note" }, `Unit: ${sentences.unit_of_votes}. ${sentences.baseline}`));
}

function promiseCard({ promise, sentences }) {
  const told = paragraphs(sentences.promise);
  if (!promise) return card("promise", "Promise and result", told);
  const names = ["the least sure third", "the third between", "the surest third"];
  const rows = promise.thirds.map((third, index) => ({
    name: names[index], ...third.gained, mark: third.claimed, more: `claimed ${share(third.claimed)}, ${plural(third.runs, "run")}`, ...third,
  }));
  return card("promise", "Promise and result", told,
    el("p", {}, "Runs that left uniform rank, by how sure the votes were (expected gain over their spread): the share that ended better than uniform rank."),
    intervalBars("Share of runs that gained", rows, share, [1]),
    key([svg("path", { d: "M9 0l7 7l-7 7l-7 -7z", class: "bound" }), "claimed by the votes"], whiskerSign()),
    barTable("Promise and result by thirds", "third", rows, share, [
      { name: "claimed", value: (row) => row.claimed, text: share }, { name: "gain over spread", value: (row) => row.surety, text: number },
      { name: "runs", value: (row) => row.runs, text: number }]));
}

function kindsCard({ parts, beside, worth }) {
  const figures = (name, figure, more) => ({ name, ...figure, nothing: figure.decides_nothing, more });
  const rows = parts.filter((part) => part.improvement).map((part) => figures(part.name, part.improvement, `${plural(part.runs, "run")}, ${plural(part.tasks, "task")}`));
  const alone = parts.filter((part) => !part.improvement).map((part) => part.name);
  const others = Object.entries(beside).map(([name, figure]) => figures(name, figure));
  const worths = Object.entries(worth).map(([how, figure]) => figures(how === "static" ? "changes on the way" : "choice of layers", figure));
  if (!rows.length && !others.length && !worths.length) return null;
  return card("kinds", "Where it gains",
    rows.length ? [el("p", {}, "Mean gain over uniform rank, in shares of the headroom."), intervalBars("Gain by kind of task", rows, change),
      barTable("Gain by kind of task", "kind", rows, change, [{ name: "runs", value: (row) => row.more, wide: true }])] : null,
    alone.length ? el("p", { class: "note" }, `One task alone tells no interval: ${alone.join(", ")}.`) : null,
    worths.length ? block(3, "What its parts are worth", el("p", {}, "How much better its runs end than runs at its final ranks: taken from the first step on, and dealt anew among the modules of each kind."),
      intervalBars("Worth of the policy's parts", worths, change), barTable("Worth of the policy's parts", "part", worths, change)) : null,
    others.length ? block(3, "Against other policies", el("p", {}, "How much better its runs end than those of another policy on the same tasks and seeds."),
      intervalBars("Gain over other policies", others, change), barTable("Gain over other policies", "policy", others, change)) : null,
    key(whiskerSign(), nothingSign()));
}

function traitsCard({ traits, worst, sentences }) {
  if (!traits.length) return null;
  const rows = traits.map(({ name, distance, worst: mine, rest }) => (
    { name, ...distance, nothing: distance.decides_nothing, more: `${number(mine)} against ${number(rest)}`, mine, rest }));
  return card("traits", "What the worst runs have in common", el("p", { class: "finding" }, sentences.traits[0]), paragraphs(sentences.traits.slice(1)),
    el("p", {}, `The ${plural(worst.length, "run")} of the worst tenth against the others: to the right, what they have more of; to the left, less. In standard deviations over all runs.`),
    intervalBars("Distance of the worst runs from the rest", rows, change), key(whiskerSign(), nothingSign()),
    barTable("Traits of the worst runs", "trait", rows, change, [
      { name: "worst", value: (row) => row.mine, text: number }, { name: "rest", value: (row) => row.rest, text: number }]));
}

function worstCard(data) {
  return card("worst", "The worst runs", el("p", {}, "The worst first: the gain over uniform rank, in shares of the headroom, and the task. Each opens."),
    el("div", { onkeydown: walkDecisions, class: "list" }, data.worst.map((run, index) => openingItem(`worst-${index}`, run.task, 3,
      [el("span", { class: "number" }, change(run.improvement)), el("span", { class: "what" }, run.task, run.seed && !run.task.endsWith(`/${run.seed}`) ? `, seed ${run.seed}` : "",
        el("em", {}, (run.explanation || {}).verdict))],
      () => worstParts(run, data)))));
}

function worstParts(run) {
  const explanation = run.explanation || {};
  const losses = [["held-out loss", run.loss === null ? "failed" : number(run.loss, 4)], ["of uniform rank", number(run.uniform_loss, 4)], ["of the best known plan", number(run.best_loss, 4)]];
  const moved = run.later.filter((each) => each.changed).map((each) => `at step ${each.step} (${plural(each.changed, "module")})`);
  const later = !run.later.length ? "No decision followed." : moved.length ? `Later decisions moved ranks ${moved.join(", ")}.` : `${plural(run.later.length, "later decision")} moved nothing.`;
  return [
    el("p", { class: "lead" }, explanation.verdict),
    el("dl", { class: "facts" }, losses.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    planPart(run.plan), el("p", {}, later), votesPart(explanation), shapleyPart(explanation.shapley),
    el("details", {}, el("summary", {}, "All that is known of the first decision"), sentencesOf(explanation).map((sentence) => el("p", {}, sentence))),
    el("p", { class: "note" }, "Its decisions in full: ", el("code", {}, `rankpilot study ${run.log}`), " in the folder of the evaluation."),
  ].filter(Boolean);
}

// The ranks of the first plan, a row for each layer.
function planPart({ kinds, layers, ranks }) {
  const top = Math.log2(1 + Math.max(1, ...ranks.flat().filter(known)));
  const cell = (value) => el("td", { class: "figure", style: value ? `background: color-mix(in srgb, var(--accent) ${Math.round((40 * Math.log2(1 + value)) / top)}%, transparent)` : null },
    value === 0 ? el("span", { class: "faint" }, "0") : rankText(value));
  return part("Its first plan", el("p", { class: "note" }, "Ranks by layer, the network's output at the top. Rank 0 is not adapted."),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Ranks of the first plan" }, el("table", { class: "plan" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), kinds.map((kind) => el("th", { scope: "col", class: "figure" }, kind)))),
      el("tbody", {}, layers.map((layer, index) => el("tr", {}, el("th", { scope: "row" }, layer), ranks[index].map(cell)))))));
}

startPage((data) => {
  showViews([["verdict", "Verdict", verdictCard(data)], ["drivers", "Drivers", driversCard(data)], ["promise", "Promise", promiseCard(data)],
    ["kinds", "Where it gains", kindsCard(data)], ["traits", "Traits", traitsCard(data)], ["worst", "Worst runs", worstCard(data)]]);
  return `${data.policy} on ${plural(data.tasks, "task")}`;
});
