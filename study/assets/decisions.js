// The list of decisions. Each opens in place, and is drawn when it is first opened.

const AT_ONCE = 50;
const growLists = {};  // by run: shows the list as far as a decision

function decisionList(run, runIndex, several) {
  const items = el("div", {}), all = run.decisions;
  const grow = (count) => {
    const from = items.children.length, to = Math.min(all.length, from + count);
    items.append(...all.slice(from, to).map((decision) => decisionItem(run, decision, runIndex)));
    more.hidden = to === all.length;
    more.textContent = `Show ${Math.min(AT_ONCE, all.length - to)} more of ${all.length.toLocaleString("en")} decisions`;
  };
  const more = el("button", { type: "button", class: "plain more", onclick: () => grow(AT_ONCE) });
  growLists[runIndex] = (number) => grow(Math.max(0, 1 + all.findIndex((decision) => decision.number === number) - items.children.length));
  grow(AT_ONCE);
  const heading = several ? el("h3", { class: "runname" }, runBadge(runIndex), run.name) : null;
  return el("div", { class: "list" }, heading, items, more);
}

function decisionItem(run, decision, runIndex) {
  const words = (decision.explanation || {}).verdict, name = `Decision ${decision.number}`;
  const head = [el("span", { class: "number" }, name), el("span", { class: "what" }, decision.line, words ? el("em", {}, words) : null)];
  return openingItem(`decision-${runIndex}-${decision.number}`, name, several() ? 4 : 3, head, () => decisionParts(run, decision));
}

// An item of a list that opens in place; parts() gives its content when it is first opened.
function openingItem(id, label, level, head, parts) {
  const panel = el("div", { class: "panel", id, hidden: true, role: "region", "aria-label": label });
  const toggle = () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    panel.hidden = !open;
    if (open && !panel.hasChildNodes()) panel.append(...parts());
  };
  const button = el("button", { type: "button", class: "opener", "aria-expanded": "false", "aria-controls": id, onclick: toggle }, head);
  return el("div", { class: "item" }, el(`h${level}`, { class: "heading" }, button), panel);
}

// Arrow keys move between decisions, Home and End to the first and the last.
function walkDecisions(event) {
  if (!event.target.classList.contains("opener")) return;
  const all = [...event.currentTarget.querySelectorAll(".opener")], at = all.indexOf(event.target);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  all[Math.max(0, Math.min(all.length - 1, to))].focus();
}

function openDecision(runIndex, decision) {
  growLists[runIndex](decision);
  const panel = document.getElementById(`decision-${runIndex}-${decision}`);
  const button = panel && panel.parentNode.querySelector(".opener");
  if (!button) return;
  if (panel.hidden) button.click();
  button.focus();
  button.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

const part = (title, ...content) => block(several() ? 5 : 4, title, content);

function decisionParts(run, decision) {
  const explanation = decision.explanation || {};
  return [
    el("p", { class: "lead" }, explanation.verdict || decision.summary),
    explanation.verdict ? el("p", {}, decision.summary) : null,
    sentencesOf(explanation).map((sentence) => el("p", {}, sentence)),
    facts(run, decision),
    plansPart(run, explanation),
    lossPart(explanation.parts),
    whatIfPart(explanation.what_ifs),
    projectionPart(run, decision),
    mapPart(run, decision),
    modulePart(run, decision),
  ].flat().filter(Boolean);
}

// What-ifs have a part of their own.
function sentencesOf({ sentences, what_ifs: whatIfs }) {
  return (sentences || []).filter((sentence) => !(whatIfs || []).some((each) => each.text === sentence));
}

function facts(run, decision) {
  const rows = [
    ["policy", decision.policy], ["previous training loss", decision.loss, number], ["rank floor", decision.rank_floor || null, number],
    ["depth bias", decision.rank_floor ? decision.depth_bias : null, number],
    ["modules filled up", decision.filled || null, number], ["kept the ranks", decision.kept ? "yes" : null],
    ["correction by the guard", decision.correction ? "yes" : null],
    [run.predicted_of, decision.predicted_cost, (value) => costText(value, run.unit)],
    ["measured before", decision.measured_cost, (value) => costText(value, run.unit)],
  ].filter(([, value]) => known(value));
  return el("dl", { class: "facts" }, rows.map(([name, value, form]) => el("div", {}, el("dt", {}, name), el("dd", {}, form ? form(value) : value))));
}

function plansPart(run, explanation) {
  const plans = explanation.plans || [], yes = (value) => (known(value) ? (value ? "yes" : "no") : undefined);
  if (!plans.length) return null;
  const columns = [
    { name: "plan", value: (plan) => (plan.taken ? `▸ ${plan.name}` : plan.name), strong: (plan) => plan.taken },
    { name: run.unit === "bytes" ? "memory" : run.unit, value: (plan) => plan.cost, text: (value) => costText(value, run.unit) },
    { name: "step time", value: (plan) => plan.time, text: (value) => (known(value) ? `${Math.round(100 * value)}%` : "–") },
    { name: "expected loss", value: (plan) => plan.expected, text: lossText }, { name: "very likely at most", value: (plan) => plan.surely, text: lossText },
    { name: "fits", value: (plan) => yes(plan.fits) }, { name: "within tolerance", value: (plan) => yes(plan.within) },
  ].filter((column) => plans.some((plan) => known(column.value(plan))));
  const more = explanation.plans_in_all - plans.length;
  return part("Plans", el("p", {}, "Losses are relative to plain LoRA, rank 8 on all modules; the best plans for the goal come first.",
    more > 0 ? ` ${plural(more, "plan")} ranked lower ${more > 1 ? "are" : "is"} not shown.` : ""), sortable("Plans", columns, plans));
}

function lossPart(parts) {
  if (!(parts || []).length) return null;
  return part("Effects on the expected loss", el("p", {}, "The prediction is the sum of these effects; effects to the left lower the loss."), bars("Effects on the expected loss", parts));
}

function whatIfPart(whatIfs) {
  if (!whatIfs || !whatIfs.length) return null;
  return part("What if", el("ul", {}, whatIfs.map((each) => el("li", {}, each.text))));
}

function projectionPart(run, decision) {
  const types = [...new Set(run.modules.map((module) => module.type))], mean = (values) => {
    const present = values.filter(known);
    return present.length ? present.reduce((sum, value) => sum + value, 0) / present.length : null;
  };
  const rows = types.map((name) => {
    const inside = run.modules.map((_, index) => index).filter((index) => run.modules[index].type === name);
    return { name, asked: mean(inside.map((index) => decision.asked[index])), got: mean(inside.map((index) => decision.after[index])) };
  }).filter((row) => known(row.asked) && known(row.got));
  if (!rows.some((row) => row.asked !== row.got)) return part("Requested and actual ranks", el("p", {}, "Every module got the requested rank."));
  const changed = decision.changed ? `The budget changed the requested rank of ${plural(decision.changed, "module")}. ` : "";
  return part("Requested and actual ranks", el("p", {}, `${changed}Mean rank by type: ring requested, dot actual.`), askedAndGot(rows));
}

function mapPart(run, decision) {
  if (data.by_type) return null;
  const { rows, groups, lookup } = cellsOf(run);
  const mean = (values, inside) => inside.reduce((sum, index) => sum + values[index], 0) / inside.length;
  const at = (row, group) => (lookup[row][group] || []).filter((index) => known(decision.after[index]));
  const moved = (row, group) => at(row, group).some((index) => decision.after[index] !== decision.before[index]);
  const map = heatMap({
    label: `Ranks after decision ${decision.number}, by layer and type of module`, rows, framed: true, middle: true, least: 58, widest: 96, tallest: 20,
    groups: groups.map((name) => ({ name, widths: [1] })),
    value: (row, group) => (at(row, group).length ? mean(decision.after, at(row, group)) : null), marked: moved,
    text: (row, group) => {
      const inside = at(row, group);
      if (!inside.length) return `${rows[row]}, ${groups[group]}: no module`;
      const before = rankText(mean(decision.before, inside)), after = rankText(mean(decision.after, inside));
      return `${cellName(run, inside, rows[row], groups[group])}: ${decision.measures ? `rank ${after}` : before === after ? `rank ${after}, unchanged` : `rank ${before} → ${after}`}`;
    },
  });
  return part("Ranks after the decision", el("p", { class: "note" }, "Framed: changed by this decision. The network's output is at the top."), map);
}

function reasonText(run, pairs) {
  return (pairs || []).map(([feature, distance]) => `${words(run.features[feature])} ${signed(distance)} sd`).join(", ");
}

function modulePart(run, decision) {
  const rows = run.modules.map((module, index) => ({ module, index })).filter(({ index }) => known(decision.after[index]));
  const columns = [
    { name: "module", value: ({ module }) => module.label, title: ({ module }) => module.name, order: ({ index }) => index },
    { name: "before", value: ({ index }) => (decision.measures ? null : decision.before[index]), text: rankText }, { name: "requested", value: ({ index }) => decision.asked[index], text: rankText },
    { name: "actual", value: ({ index }) => decision.after[index], text: rankText, strong: ({ index }) => decision.after[index] !== decision.before[index] },
    { name: "score", value: ({ index }) => (decision.score.some(Boolean) ? decision.score[index] : null), text: fixed },
    { name: "stands out by", value: ({ index }) => (decision.reasons ? reasonText(run, decision.reasons[index]) : null), wide: true },
    { name: "note", value: ({ index }) => noteText(decision, index), wide: true },
    { name: "modules", value: ({ module }) => (module.count > 1 ? module.count : null), text: number },
  ].filter((column) => rows.some((row) => known(column.value(row))));
  const moved = rows.filter(({ index }) => decision.after[index] !== decision.before[index]);
  const place = el("div", {}), box = el("input", { type: "checkbox", onchange: () => show() });
  box.checked = moved.length > 0 && moved.length < rows.length;
  const show = () => place.replaceChildren(sortable(`Modules of decision ${decision.number}`, columns, box.checked ? moved : rows));
  show();
  const choice = box.checked ? el("label", { class: "only" }, box, ` show only the ${plural(moved.length, "module")} that changed, of ${rows.length.toLocaleString("en")}`) : null;
  return part(data.by_type ? "Modules by type" : "Modules", choice, place,
    decision.reasons ? el("p", { class: "note" }, '"Stands out by" lists unusual signals (sd: standard deviations from the mean of all modules), not necessarily what the policy used.') : null);
}

function noteText(decision, index) {
  const parts = [(decision.notes || {})[index], (decision.pinned || []).includes(index) ? "pinned" : null].filter(Boolean);
  return parts.length ? parts.join("; ") : null;
}

// columns [{ name, value(row), text(value), title(row), order(row), strong(row), wide }]; a click on a head sorts.
function sortable(label, columns, rows) {
  const body = el("tbody", {}), heads = [];
  let by = null, down = false;
  const cellOf = (row) => (column) => {
    const value = column.value(row), shown = column.text ? column.text(value) : value ?? "";
    const className = [typeof value === "number" || column.text ? "figure" : "", column.wide ? "wide" : ""].join(" ").trim();
    const attributes = { class: className || null, title: column.title ? column.title(row) : null };
    return el("td", attributes, column.strong && column.strong(row) ? el("b", {}, shown) : shown);
  };
  const draw = () => {
    const key = by && (by.order || by.value), sorted = [...rows];
    if (key) sorted.sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
    body.replaceChildren(...sorted.map((row) => el("tr", {}, columns.map(cellOf(row)))));
    heads.forEach((head, index) => head.setAttribute("aria-sort", by !== columns[index] ? "none" : down ? "descending" : "ascending"));
  };
  for (const column of columns) {
    const sort = () => { down = by === column ? !down : false; by = column; draw(); };
    heads.push(el("th", { scope: "col" }, el("button", { type: "button", class: "sorter", onclick: sort }, column.name)));
  }
  draw();
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}

function compare(a, b) {
  if (!known(a) || !known(b)) return known(a) ? -1 : known(b) ? 1 : 0;
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}
