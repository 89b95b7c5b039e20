// The seconds of a step, as the arithmetic of cost/work_growth.py and cost/step_time.py has them, where all modules have
// an adapter. Work is what `tools/make_page.py` writes of the operators of a step.

const PARAMETER_BYTES = 44; // see PARAMETER_BYTES of cost/step_time.py

// What a step of one of `SAVERS` computes; one without savers counts as one with those that take no time.
function workOf(model, savers, rows, length) {
  const own = (name) => model.works.filter((work) => work.savers === name);
  const ofBatch = (works) => works.find(({ shapes: [[height, most], ...others] }) => (others.length ? most === usualLength(model, length) : most === length && height === (rows > 1 ? 4 : 1))) ?? null;
  return ofBatch(own(savers)) ?? (savers === "selective" ? null : ofBatch(own(savers === "none" ? "free" : "none")));
}

// By how much counts at some shapes add up to what is counted at another one: a constant part, and two that grow with the
// rows, in proportion to the length and to its square.
function weights(shapes, rows, length) {
  if (shapes.length === 1 || (shapes[0][0] === rows && shapes[0][1] === length)) return [1];
  const powers = shapes.map(([r, l]) => [1, r * l, r * l * l]), here = [1, rows * length, rows * length * length];
  const minor = ([a, b, c]) => a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]);
  const whole = minor(powers);
  return powers.map((_, i) => minor(powers.map((row, j) => (i === j ? here : row))) / whole);
}

// Seconds of operators at these rates, where so many of the lowest layers run again; see `StepWork._time`.
function secondsAt(model, work, { rows, length }, { flops, bytes, operator }, rankOf, checkpointed) {
  const by = weights(work.shapes, rows, length), shapes = work.shapes.length;
  const grown = (amounts, first) => {
    const sum = by.reduce((total, weight, shape) => total + weight * amounts[first + shape], 0);
    return by.length > 1 ? Math.max(Math.round(sum), 0) : sum;
  };
  let seconds = 0;
  for (const each of work.operators) {
    const done = grown(each, 0) / flops, moved = grown(each, shapes) / bytes, [backward, highest, outside, inside] = each.slice(2 * shapes);
    const own = highest ? moved + operator + (done / work.rank) * rankOf(highest) : Math.max(done, moved) + operator;
    const within = (layers) => (Array.isArray(inside) ? inside.slice(0, layers).reduce((sum, count) => sum + count, 0) : inside * layers);
    seconds += own * (outside + within(work.layers) + (backward ? 0 : within(checkpointed)));
  }
  for (let module = 0; module < model.widths.length; module++) seconds += (PARAMETER_BYTES * model.widths[module] * rankOf(model.highest[module])) / bytes;
  return seconds;
}

// The seconds of a step on a card: those of its work, or of its launches where these take longer; see `StepWork.time`.
function stepSeconds(model, work, card, launch, { rank, rows, length }, checkpointed) {
  const batch = { rows, length }, rates = { flops: card.flops, bytes: card.bytes, operator: 0 }, alone = { flops: Infinity, bytes: Infinity, operator: launch };
  const [working, launching] = [rates, alone].map((each) => secondsAt(model, work, batch, each, () => work.rank, work.layers));
  return secondsAt(model, work, batch, working >= launching ? rates : alone, (highest) => Math.min(rank, highest), checkpointed);
}

// The seconds of a step by which copies of streamed layers exceed what hides them; see `BaseLayers.exposed_seconds`.
function exposedSeconds(model, stream, forward, backward, bus) {
  if (!stream) return 0;
  const copy = layerBytes(model) / bus, rest = (stream - 1) * copy;
  return copy + Math.max(rest - forward, 0) + Math.max(rest - backward, 0);
}
