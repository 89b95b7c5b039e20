// Pictures of why a plan was taken: the parts of its expected loss, what was asked for and what was got.

const text = (x, y, anchor, className, ...words) => svg("text", { x, y, "text-anchor": anchor, class: className }, ...words);

function picture(label, width, height, ...parts) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts);
}

const ruler = document.createElement("canvas").getContext("2d");

// A text cut at its end to a width in pixels, with the whole of it as its title.
function cutText(x, y, anchor, className, words, width) {
  ruler.font = "400 13px system-ui, sans-serif";
  let cut = words;
  while (cut && ruler.measureText(cut === words ? words : `${cut}…`).width > width) cut = cut.slice(0, -1);
  return text(x, y, anchor, className, cut === words ? words : `${cut}…`, svg("title", {}, words));
}

// A difference of log losses as a change of the loss.
function lossText(value) {
  const change = known(value) ? fixed(100 * Math.expm1(value), 1) : "–";
  return known(value) ? `${change.startsWith("−") ? "" : "+"}${change} %` : change;
}

// rows [{ name, value }], in log loss: bars from zero to the left and right, the value beside each.
function bars(label, rows) {
  const high = Math.max(0, ...rows.map((row) => row.value)), low = Math.min(0, ...rows.map((row) => row.value));
  return responsive({ class: "evidence" }, (width) => {
    const named = Math.min(320, 0.5 * width), told = 64, room = width - named - told - 16;
    const scale = room / (high - low || 1), zero = named + 8 - low * scale, height = 26 * rows.length + 4;
    const drawn = rows.map((row, index) => {
      const y = 26 * index, x = zero + Math.min(0, row.value) * scale, className = row.value > 0 ? "bar loss" : "bar";
      return [
        cutText(named, y + 17, "end", "name", row.name, named),
        svg("rect", { x, y: y + 4, width: Math.max(1, Math.abs(row.value) * scale), height: 18, rx: 2, class: className }),
        text(width - 2, y + 17, "end", "name", lossText(row.value)),
      ];
    });
    const words = `${label}: ${rows.map((row) => `${row.name} ${lossText(row.value)}`).join("; ")}`;
    return picture(words, width, height, svg("line", { x1: zero, x2: zero, y1: 0, y2: height, class: "zero" }), drawn);
  });
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
