// A grid of ranks on a canvas: rows are layers, columns stand in groups. Arrow keys walk over its cells.

let palette = null;

function rankColor(rank) {
  const colors = isDark() ? [...palette.colors].reverse() : palette.colors;
  const ranks = palette.ranks;
  let at = ranks.findIndex((other) => other >= rank);
  if (at < 0) at = ranks.length - 1;
  if (at === 0) return colors[0];
  const share = Math.min(1, (rank - ranks[at - 1]) / (ranks[at] - ranks[at - 1]));
  return colors[at].map((value, index) => colors[at - 1][index] + share * (value - colors[at - 1][index]));
}

const rgb = (color) => `rgb(${color.map(Math.round).join(" ")})`;
const inkOn = (color) => (0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 128 ? "#ffffff" : "#1a1a1a");

function hatchPattern(context) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const ink = tile.getContext("2d");
  ink.fillStyle = cssColor("--empty");
  ink.fillRect(0, 0, 6, 6);
  ink.strokeStyle = cssColor("--hatch");
  for (const shift of [-3, 3]) {
    ink.beginPath();
    ink.moveTo(shift - 1, 7);
    ink.lineTo(shift + 7, -1);
    ink.stroke();
  }
  return context.createPattern(tile, "repeat");
}

function rankKey(top) {
  const ranks = palette.ranks.filter((rank) => rank <= Math.max(top, 8));
  const highest = Math.ceil(top);
  if (highest > ranks[ranks.length - 1] && ranks.length < palette.ranks.length) ranks.push(palette.ranks[ranks.length]);
  const swatch = (rank) => {
    const chip = el("span", { class: rank ? "chip" : "chip none" });
    if (rank) chip.style.background = rgb(rankColor(rank));
    return el("span", { class: "key" }, chip, rank ? String(rank) : "0 (no adapter)");
  };
  const draw = () => el("div", { class: "keys" }, el("span", { class: "faint" }, "rank"), [0, ...ranks].map(swatch));
  return responsive({ class: "keyhost", role: "img", "aria-label": `Colours of ranks: ${[0, ...ranks].join(", ")}` }, draw);
}

/* spec: label, rows [text], groups [{ name, widths }], value(row, group, column) -> rank or null, text(row, group, column),
   marked(row, group, column), framed and middle (how a marked cell looks), least and widest (pixels of a group), tallest
   (pixels of a row), foot [text at left, text at right], ticks [columns with a triangle above], enter(row, group, column). */
function heatMap(spec) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const tip = el("div", { class: "tip", hidden: true });
  const cell = el("div", { role: "gridcell", id: `cell-${(heatMap.count = (heatMap.count || 0) + 1)}` });
  const columns = spec.groups.reduce((sum, group) => sum + group.widths.length, 0);
  const wrap = el("div", {
    class: "heatmap", tabindex: 0, role: "grid", "aria-label": spec.label, "aria-rowcount": spec.rows.length,
    "aria-colcount": columns, "aria-activedescendant": cell.id, "aria-readonly": "true",
  }, canvas, tip, el("div", { class: "unseen", role: "row" }, cell));
  const ratio = window.devicePixelRatio || 1, grid = document.createElement("canvas");
  let plan = null, here = null, pinned = false;

  const host = responsive({ class: "heathost" }, (width) => {
    plan = layOut(spec, width);
    for (const surface of [grid, canvas]) {
      surface.width = plan.width * ratio;
      surface.height = plan.height * ratio;
      surface.getContext("2d").scale(ratio, ratio);
    }
    canvas.style.width = `${plan.width}px`;
    canvas.style.height = `${plan.height}px`;
    drawGrid(grid.getContext("2d"), spec, plan);
    paint();
    return wrap;
  });

  function paint() {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, plan.width, plan.height);
    context.drawImage(grid, 0, 0, plan.width, plan.height);
    if (here) drawFocus(context, plan.box(here));
  }

  function show(place) {
    here = place;
    paint();
    const text = spec.text(...place);
    cell.textContent = text;
    cell.parentNode.setAttribute("aria-rowindex", place[0] + 1);
    cell.setAttribute("aria-colindex", plan.flat(place) + 1);
    tip.textContent = text;
    tip.hidden = false;
    const box = plan.box(place), wide = Math.min(340, plan.width);
    tip.style.maxWidth = `${wide}px`;
    const tall = tip.offsetHeight;
    tip.style.left = `${Math.max(0, Math.min(box.x + box.w / 2 - tip.offsetWidth / 2, plan.width - tip.offsetWidth))}px`;
    tip.style.top = `${box.y - tall - 8 < 0 ? box.y + box.h + 8 : box.y - tall - 8}px`;
  }

  function hide() {
    here = null;
    tip.hidden = true;
    if (plan) paint();
  }

  const placeOf = (event) => {
    const frame = canvas.getBoundingClientRect();
    return plan.find(event.clientX - frame.left, event.clientY - frame.top);
  };
  wrap.addEventListener("pointermove", (event) => {
    const place = placeOf(event);
    if (place) { pinned = false; show(place); } else if (!pinned && document.activeElement !== wrap) hide();
  });
  wrap.addEventListener("pointerleave", () => { if (!pinned && document.activeElement !== wrap) hide(); });
  wrap.addEventListener("click", (event) => {
    const place = placeOf(event);
    if (place) { pinned = true; show(place); }
  });
  wrap.addEventListener("focus", () => { if (wrap.matches(":focus-visible")) show(here || [0, 0, 0]); });
  wrap.addEventListener("blur", () => { pinned = false; hide(); });
  wrap.addEventListener("keydown", (event) => {
    const [row, group, column] = here || [0, 0, 0];
    const flat = plan.flat([row, group, column]);
    const steps = {
      ArrowUp: [row - 1, flat], ArrowDown: [row + 1, flat], ArrowLeft: [row, flat - 1], ArrowRight: [row, flat + 1],
      Home: [row, 0], End: [row, columns - 1], PageUp: [0, flat], PageDown: [spec.rows.length - 1, flat],
    };
    if (steps[event.key]) {
      event.preventDefault();
      const [to, at] = steps[event.key];
      const clamp = (value, top) => Math.max(0, Math.min(top, value));
      show([clamp(to, spec.rows.length - 1), ...plan.unflat(clamp(at, columns - 1))]);
    } else if (event.key === "Enter" && spec.enter && here) {
      event.preventDefault();  // or the key would also press the button that gets the focus
      spec.enter(...here);
    } else if (event.key === "Escape") {
      hide();
    }
  });
  return host;
}

const FOOT = 22, LABEL_FONT = "11px system-ui, sans-serif", HEAD_FONT = "600 12px system-ui, sans-serif";

// Where everything is: as many groups in a line as have room, lines of about equal length.
function layOut(spec, width) {
  const measure = document.createElement("canvas").getContext("2d");
  measure.font = LABEL_FONT;
  const longest = Math.max(0, ...spec.rows.map((name) => measure.measureText(name).width));
  const left = Math.ceil(Math.min(longest + 8, 0.3 * width)), gap = 12, right = 4;
  const room = width - left - right, count = spec.groups.length;
  const most = Math.max(1, Math.min(count, Math.floor((room + gap) / (spec.least + gap))));
  const lines = Math.ceil(count / most), inLine = Math.ceil(count / lines);
  const groupWidth = Math.min((room + gap) / inLine - gap, spec.widest || Infinity);
  const tall = Math.max(3, Math.min(spec.tallest, Math.floor((lines > 2 ? 300 : 430) / spec.rows.length)));
  const foot = spec.foot ? FOOT : 8, head = spec.groups.some((group) => group.name) ? 44 : 14, lineHeight = head + tall * spec.rows.length + foot;
  const groups = spec.groups.map((group, index) => {
    const total = group.widths.reduce((sum, value) => sum + value, 0) || 1;
    const x = left + (index % inLine) * (groupWidth + gap), y = Math.floor(index / inLine) * lineHeight + head;
    let sum = 0;  // whole pixels, or thin columns would be blurred
    const edges = [0, ...group.widths.map((part) => (sum += part))].map((part) => Math.round(x + (part / total) * groupWidth));
    return { name: group.name, x: edges[0], y, edges };
  });
  const starts = [];
  spec.groups.reduce((sum, group, index) => { starts[index] = sum; return sum + group.widths.length; }, 0);
  return {
    width, height: lines * lineHeight, left, tall, groups, groupWidth, lines, head, lineHeight,
    flat: ([, group, column]) => starts[group] + column,
    unflat(flat) {
      let group = starts.length - 1;
      while (starts[group] > flat) group -= 1;
      return [group, flat - starts[group]];
    },
    box([row, group, column]) {
      const { y, edges } = groups[group];
      return { x: edges[column], y: y + row * tall, w: Math.max(2, edges[column + 1] - edges[column]), h: tall };
    },
    find(x, y) {
      const group = groups.findIndex(({ y: top, edges }) => x >= edges[0] && x < edges[edges.length - 1] && y >= top
        && y < top + tall * spec.rows.length);
      if (group < 0) return null;
      const column = groups[group].edges.findIndex((edge) => edge > x) - 1;
      return [Math.floor((y - groups[group].y) / tall), group, column];
    },
  };
}

function drawGrid(context, spec, plan) {
  const ink = cssColor("--ink"), faint = cssColor("--faint");
  const hatch = hatchPattern(context), gap = plan.tall >= 7 ? 1 : 0;
  context.textBaseline = "middle";
  plan.groups.forEach((group, g) => {
    drawHead(context, group, plan, ink, faint);
    for (let column = 0; column < group.edges.length - 1; column += 1) {
      const x = group.edges[column], w = group.edges[column + 1] - x;
      for (let row = 0; row < spec.rows.length; row += 1) {
        const rank = spec.value(row, g, column);
        if (!known(rank)) continue;
        const y = group.y + row * plan.tall, color = rank ? rankColor(rank) : null;
        context.fillStyle = color ? rgb(color) : hatch;
        context.fillRect(x, y, w - (w > 6 ? 1 : 0), plan.tall - gap);
        const marked = spec.marked(row, g, column);
        if ((marked || spec.framed) && plan.tall >= 12 && w >= 20) {
          context.font = LABEL_FONT;
          context.fillStyle = color ? inkOn(color) : faint;
          context.textAlign = spec.middle ? "center" : "left";
          const told = rankText(rank), room = w - (spec.middle ? 6 : 5);
          if (context.measureText(told).width <= room) context.fillText(told, spec.middle ? x + w / 2 : x + 4, y + plan.tall / 2);
        }
        if (spec.framed && marked) {
          context.strokeStyle = ink;
          context.lineWidth = plan.tall >= 8 ? 2 : 1;
          context.strokeRect(x + 1, y + 1, w - 3, Math.max(1, plan.tall - gap - 2));
        }
      }
    }
    if (spec.ticks && g < plan.groups.length) drawTicks(context, spec, group, ink);
    if (spec.foot) {
      context.font = LABEL_FONT;
      context.fillStyle = faint;
      const under = group.y + plan.tall * spec.rows.length + 11;
      context.textAlign = "left";
      context.fillText(spec.foot[0], group.x, under);
      context.textAlign = "right";
      context.fillText(spec.foot[1], group.edges[group.edges.length - 1], under);
    }
  });
  drawRowNames(context, spec, plan, faint);
}

// The name of a group in two lines, broken at its last dot, each cut to the group's width.
function drawHead(context, group, plan, ink, faint) {
  const cut = group.name.lastIndexOf("."), parts = [group.name.slice(0, cut + 1), group.name.slice(cut + 1)];
  context.textAlign = "left";
  [[LABEL_FONT, faint, -33], [HEAD_FONT, ink, -18]].forEach(([font, color, shift], index) => {
    context.font = font;
    context.fillStyle = color;
    context.fillText(cutStart(context, parts[index], plan.groupWidth), group.x, group.y + shift);
  });
}

function drawTicks(context, spec, group, ink) {
  context.fillStyle = ink;
  for (const column of spec.ticks) {
    const x = group.edges[column];
    context.beginPath();
    context.moveTo(x - 3, group.y - 8);
    context.lineTo(x + 3, group.y - 8);
    context.lineTo(x, group.y - 3);
    context.fill();
  }
}

function drawRowNames(context, spec, plan, faint) {
  const every = Math.ceil(13 / plan.tall);
  context.font = LABEL_FONT;
  context.fillStyle = faint;
  context.textAlign = "right";
  for (let line = 0; line < plan.lines; line += 1) {
    const top = line * plan.lineHeight + plan.head;
    spec.rows.forEach((name, row) => {
      if (row % every) return;
      context.fillText(cutStart(context, name, plan.left - 6), plan.left - 6, top + (row + 0.5) * plan.tall);
    });
  }
}

function drawFocus(context, box) {
  context.lineWidth = 4;
  context.strokeStyle = cssColor("--paper");
  context.strokeRect(box.x - 1, box.y - 1, box.w + 1, box.h + 1);
  context.lineWidth = 2;
  context.strokeStyle = cssColor("--focus");
  context.strokeRect(box.x - 1, box.y - 1, box.w + 1, box.h + 1);
}
