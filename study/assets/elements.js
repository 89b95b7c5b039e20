// Elements, numbers and colours that all views share. Text from the data enters the page as text nodes alone.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false && child !== "") {
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
  }
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const repaints = new Set();

// An element that is drawn again whenever its width or the theme changes; `draw(width)` returns its content.
function responsive(attributes, draw) {
  const host = el("div", attributes);
  let width = 0;
  const paint = () => {
    if (!width || !host.isConnected) return;
    const content = draw(width);
    if (host.firstChild !== content) host.replaceChildren(content);  // else it keeps the focus
  };
  new ResizeObserver((entries) => {
    const now = Math.floor(entries[0].contentRect.width);
    if (now && now !== width) { width = now; paint(); }
  }).observe(host);
  repaints.add(paint);
  return host;
}

const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => document.documentElement.dataset.theme === "dark";
const runColor = (index) => cssColor(`--run-${index % 6}`);
const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];

const minus = (text) => text.replace(/-/g, "−");
const known = (value) => value !== null && value !== undefined;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

function number(value, digits = 3) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return minus(Math.round(value).toLocaleString("en"));
  return minus(String(Number(value.toPrecision(size >= 100 ? 3 : digits))));
}

const signed = (value, digits = 3) => (known(value) && value > 0 ? "+" : "") + number(value, digits);
const fixed = (value, digits = 3) => (known(value) ? minus((Number(value.toFixed(digits)) || 0).toFixed(digits)) : "–");  // no −0.000
const rankText = (value) => (known(value) ? number(value, 3) : "–");

function byteScale(count) {
  const power = Math.min(3, Math.max(0, Math.floor(Math.log2(Math.max(count, 1)) / 10)));
  return { name: ["B", "KiB", "MiB", "GiB"][power], size: 1024 ** power };
}

function costText(value, unit) {
  if (!known(value)) return "–";
  if (unit !== "bytes") return `${Math.round(value).toLocaleString("en")} ${unit}`;
  const scale = byteScale(value);
  return `${Number((value / scale.size).toPrecision(4)).toLocaleString("en")} ${scale.name}`;
}

// A name cut at its start to a width in pixels: what tells names of modules apart is at their end.
function cutStart(context, name, width) {
  let cut = name;
  while (cut && context.measureText(cut === name ? name : `…${cut}`).width > width) cut = cut.slice(1);
  return cut === name ? name : `…${cut}`;
}

// Whole words for names of settings and groups: "rank_floor" -> "rank floor".
const words = (name) => String(name).replace(/_/g, " ");

// A section of the page, or a part of a decision.
function block(level, title, ...content) {
  return el("section", { class: level > 2 ? "part" : "card" }, el(`h${level}`, {}, title), content);
}
