// Pictures of why a plan was taken: votes of the networks, shares of the features, what was asked for and what was got.

const text = (x, y, anchor, className, ...words) => svg("text", { x, y, "text-anchor": anchor, class: className }, ...words);

function picture(label, width, height, ...parts) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts);
}

const ruler = document.createElement("canvas").getContext("2d");

// A text cut at its end to a width in pixels, with the whole of it as its title.
function cutText(x, y, anchor, className, words, width) {
  ruler.font = `${className.includes("strong") ? 650 : 400} 13px system-ui, sans-serif`;
  let cut = words;
  while (cut && ruler.measureText(cut === words ? words : `${cut}…`).width > width) cut = cut.slice(0, -1);
  return text(x, y, anchor, className, cut === words ? words : `${cut}…`, svg("title", {}, words));
}

// rows [{ name, value, more, strong }]: bars from zero to the left and right, the value beside each.
function bars(label, rows) {
  const high = Math.max(0, ...rows.map((row) => row.value)), low = Math.min(0, ...rows.map((row) => row.value));
  return responsive({ class: "evidence" }, (width) => {
    const named = Math.min(190, 0.38 * width), told = rows.some((row) => row.more) && width > 480 ? 186 : 64;
    const room = width - named - told - 16, scale = room / (high - low || 1), zero = named + 8 - low * scale;
    const drawn = rows.map((row, index) => {
      const y = 26 * index, x = zero + Math.min(0, row.value) * scale;
      const className = row.strong ? "bar strong" : row.value < 0 ? "bar below" : "bar";
      return [
        cutText(named, y + 17, "end", row.strong ? "name strong" : "name", row.name, named),
        svg("rect", { x, y: y + 4, width: Math.max(1, Math.abs(row.value) * scale), height: 18, rx: 2, class: className }),
        text(width - told + 2, y + 17, "start", row.strong ? "name strong" : "name", plus(row.value)),
        row.more && width > 480 ? text(width - 2, y + 17, "end", "faint", row.more) : null,
      ];
    });
    const told2 = `${label}: ${rows.map((row) => `${row.name} ${plus(row.value)}`).join("; ")}`;
    const height = 26 * rows.length + 4;
    return picture(told2, width, height, svg("line", { x1: zero, x2: zero, y1: 0, y2: height, class: "zero" }), drawn);
  });
}

const plus = (value) => (value > 0 ? "+" : "") + fixed(value);

function planNames(explanation, plan) {
  const names = (explanation.candidates || []).filter((each) => each.plan === plan && each.name).map((each) => each.name);
  if (!names.length) return `plan ${plan}`;
  return names.length > 1 ? `${names[0]} and ${names.length - 1} more` : names[0];
}

// The plans with the highest bounds, and always the taken one and the reference.
function drawnPlans({ plans, taken, reference }) {
  return plans.filter((plan, place) => place < 12 || plan.plan === taken || plan.plan === reference);
}

// A row for each plan: a ring for each network, a stroke at the mean, a diamond at the bound that is maximised.
function votes(explanation) {
  const plans = drawnPlans(explanation), tied = plans.filter((plan) => plan.tied && known(plan.bound)).map((plan) => plan.bound);
  const values = plans.flatMap((plan) => [...(plan.votes || []), plan.bound, plan.mean]).filter(known);
  const low = Math.min(...values), high = Math.max(...values);
  return responsive({ class: "evidence" }, (width) => {
    const narrow = width < 480, named = narrow ? 0 : Math.min(210, 0.36 * width), told = narrow ? 0 : 58;
    const place = (value) => named + 12 + ((value - low) / (high - low || 1)) * (width - named - told - 24);
    const tall = narrow ? 44 : 26, top = 8, height = top + tall * plans.length + 22;
    const [left, right] = [place(Math.min(...tied)) - 7, place(Math.max(...tied)) + 7];
    const band = tied.length > 1 ? svg("rect", { x: left, y: 0, width: right - left, height: height - 20, class: "tie" }) : null;
    const rows = plans.map((plan, index) => voteRow(explanation, plan, top + tall * index, { width, named, place, tall, narrow }));
    const zero = low < 0 && high > 0 ? svg("line", { x1: place(0), x2: place(0), y1: 0, y2: height - 20, class: "zero" }) : null;
    const scale = [low, high].map((value, index) => text(place(value), height - 4, index ? "end" : "start", "faint", fixed(value)));
    return picture(votesInWords(explanation), width, height, band, zero, rows, scale);
  });
}

// Where a screen is narrow, the name and the bound stand above the marks.
function voteRow(explanation, plan, y, { width, named, place, tall, narrow }) {
  const taken = plan.plan === explanation.taken, style = taken ? "name strong" : "name";
  const middle = narrow ? y + 31 : y + tall / 2, line = narrow ? y + 16 : middle + 4;
  const name = (taken ? "▸ " : "") + planNames(explanation, plan.plan) + (plan.plan === explanation.reference ? " (reference)" : "") + (plan.fits === false ? " (does not fit)" : "");
  const bound = known(plan.bound) ? place(plan.bound) : null;
  const spread = plan.votes && plan.votes.length ? [Math.min(...plan.votes), Math.max(...plan.votes)] : null;
  return svg("g", { class: taken ? "plan taken" : "plan" },
    svg("rect", { x: 0, y: y + 1, width, height: tall - 2, class: "row" }),
    narrow ? cutText(4, line, "start", style, name, width - 70) : cutText(named, line, "end", style, name, named),
    spread ? svg("line", { x1: place(spread[0]), x2: place(spread[1]), y1: middle, y2: middle, class: "spread" }) : null,
    (plan.votes || []).map((vote, index) => svg("circle", { cx: place(vote), cy: middle, r: 4, class: "vote" },
      svg("title", {}, `network ${index + 1}: ${fixed(vote)}`))),
    known(plan.mean) ? svg("line", { x1: place(plan.mean), x2: place(plan.mean), y1: middle - 8, y2: middle + 8, class: "mean" }) : null,
    bound === null ? null : svg("path", { d: `M${bound} ${middle - 6}l6 6l-6 6l-6 -6z`, class: "bound" }),
    text(width - 4, line, "end", style, fixed(plan.bound)));
}

function votesInWords(explanation) {
  const plan = explanation.plans.find((each) => each.plan === explanation.taken) || explanation.plans[0];
  return `Votes of the networks over ${drawnPlans(explanation).length} plans; the taken one, ${planNames(explanation, plan.plan)}, `
    + `has mean ${fixed(plan.mean)} and lower bound ${fixed(plan.bound)}`;
}

function votesKey(tied) {
  const sign = (shape, meaning) => el("span", {}, svg("svg", { width: 14, height: 14, "aria-hidden": "true", class: "plan" }, shape), meaning);
  return el("p", { class: "note signs" },
    sign(svg("circle", { cx: 7, cy: 7, r: 4, class: "vote" }), "one network"),
    sign(svg("line", { x1: 7, x2: 7, y1: 0, y2: 14, class: "mean" }), "their mean"),
    sign(svg("path", { d: "M7 1l6 6l-6 6l-6 -6z", class: "bound" }), "lower bound, written at the right"),
    tied ? sign(svg("rect", { x: 0, y: 0, width: 14, height: 14, class: "tie" }), "bounds of the plans that are tied") : null);
}

// For each type of module the mean rank that was asked for, a ring, and the one that it got, a dot.
function askedAndGot(rows) {
  const top = Math.max(1, ...rows.flatMap((row) => [row.asked, row.got]));
  return responsive({ class: "evidence" }, (width) => {
    const named = Math.min(190, 0.38 * width), told = 88, room = width - named - told - 24;
    const place = (value) => named + 12 + (value / top) * room;
    const drawn = rows.map((row, index) => {
      const y = 13 + 26 * index;
      return [
        cutText(named, y + 4, "end", "name", row.name, named),
        svg("line", { x1: place(0), x2: place(top), y1: y, y2: y, class: "rail" }),
        svg("line", { x1: place(row.asked), x2: place(row.got), y1: y, y2: y, class: "shift" }),
        svg("circle", { cx: place(row.asked), cy: y, r: 5.5, class: "asked" }),
        svg("circle", { cx: place(row.got), cy: y, r: 4, class: "got" }),
        text(width - 2, y + 4, "end", "name", `${rankText(row.asked)} → ${rankText(row.got)}`),
      ];
    });
    const label = rows.map((row) => `${row.name}: asked ${rankText(row.asked)}, got ${rankText(row.got)}`).join("; ");
    return picture(`Mean rank by type. ${label}`, width, 26 * rows.length + 4, drawn);
  });
}
