// Steps of rows of known lengths, as padded rectangles and in parts: the arithmetic of `rankpilot memory --lengths`, which
// is that of study/lengths.py, plan/parts.py, cost/peak_candidates.py and cost/part_seconds.py where all modules have
// adapters.

const RECORDED_RANK = 2;
const MOST_LEVELS = 8; // numbers of checkpointed layers that parts may have beside none
const MOST_STEPS = 500;
const SECOND_RUN = 0.375, WORK = 4, LAUNCH_SECONDS = 22e-6; // see cost/part_seconds.py and cost/step_time.py
const NOISE = 1e-3; // bytes that sums of floating point may be off; see `ShapeBytes`

// Whole numbers between spaces, commas or line ends, such as "512, 87, 1630", or quantiles, such as "p50 300, p90 900, max
// 2048". Returns {lengths}, of rows in proportion where quantiles were given, or {wrong}: the first word that is neither.
function readLengths(text) {
  const words = text.trim().replace(/^\[|\]$/g, "").toLowerCase().split(/[\s,;:=]+/).filter(Boolean);
  if (!words.some((word) => /^(p\d|max)/.test(word))) {
    const wrong = words.find((word) => !/^\d{1,9}$/.test(word) || Number(word) < 1);
    return wrong === undefined ? { lengths: words.map(Number) } : { wrong };
  }
  const points = [[0, 1]];
  for (let i = 0; i < words.length; i += 2) {
    const share = words[i] === "max" ? 100 : /^p\d+(\.\d+)?$/.test(words[i]) ? Number(words[i].slice(1)) : NaN, [last, least] = points.at(-1);
    if (!(share > last && share <= 100)) return { wrong: words[i] };
    if (!/^\d{1,9}$/.test(words[i + 1] ?? "") || Number(words[i + 1]) < least) return { wrong: `${words[i]} ${words[i + 1] ?? ""}`.trim() };
    points.push([share, Number(words[i + 1])]);
  }
  if (points.at(-1)[0] < 100) return { wrong: `${words.slice(-2).join(" ")}, after which max is missing` };
  const rows = 1000, lengths = [];
  for (let row = 0; row < rows; row++) {
    const share = (100 * row) / (rows - 1), next = points.findIndex(([end]) => end >= share && end > 0);
    const [[from, low], [to, high]] = points.slice(next - 1, next + 1);
    lengths.push(Math.max(Math.round(low + ((high - low) * (share - from)) / (to - from)), 1));
  }
  return { lengths };
}

// Lengths in the order in which numpy's Generator draws them: Fisher and Yates' shuffle, by PCG64 from a state.
function shuffled(lengths, { state, increment }) {
  const order = [...lengths], mask = (1n << 64n) - 1n;
  let now = BigInt(state), spare = null;
  const next = () => {
    if (spare !== null) {
      const high = spare;
      spare = null;
      return high;
    }
    now = BigInt.asUintN(128, now * 0x2360ed051fc65da44385df649fccf645n + BigInt(increment));
    const value = (now >> 64n) ^ (now & mask), turn = now >> 122n;
    const drawn = ((value >> turn) | (value << (64n - turn))) & mask;
    spare = Number(drawn >> 32n);
    return Number(drawn & 0xffffffffn);
  };
  for (let last = order.length - 1; last > 0; last--) {
    const bits = 2 ** Math.ceil(Math.log2(last + 1)); // of what is drawn, as many as the place can have
    let place = next() % bits;
    while (place > last) place = next() % bits;
    [order[last], order[place]] = [order[place], order[last]];
  }
  return order;
}

// The recorded step with the lowest `level` layers checkpointed of those that hold something; see `with_checkpointed`.
function checkpointedStep(step, level, accumulates) {
  const { created, forward, sooner } = step, count = created.length;
  const kept = step.segments.filter(({ saved }) => saved.length).slice(0, level), number = new Map(kept.map((each, index) => [step.segments.indexOf(each), index]));
  const segment = step.segment.map((each) => number.get(each) ?? -1);
  const needed = step.needed.slice(), saved = new Uint8Array(count), first = new Float64Array(count).fill(NEVER);
  for (const each of step.segments) if (!kept.includes(each)) for (const serial of each.saved) needed[serial] ||= 1;
  kept.forEach((each, index) => each.saved.forEach((serial) => (saved[serial] |= segment[serial] === index)));
  for (let index = kept.length - 1; index >= 0; index--) for (const serial of kept[index].inputs) first[serial] = index;
  const freed = step.freed.slice(), isGradient = new Uint8Array(count), within = kept.map(() => []);
  for (const [serial, , added] of step.gradients) {
    if (accumulates) freed[serial] = added;
    else isGradient[serial] = 1;
  }
  for (let i = 0; i < forward; i++) if (segment[i] >= 0) within[segment[i]].push(i);
  const soonest = freed.map((time, i) => (sooner[i] < step.freed[i] ? Math.min(time, sooner[i]) : time)), inputs = serialsWhere(count, (i) => first[i] < NEVER);
  return { ...step, segments: kept, segment, needed, saved, first, freed, soonest, isGradient, within, inputs };
}

const serialsWhere = (count, holds) => [...Array(count).keys()].filter(holds);

// Bytes of some storages at each time.
function levels({ created }, sizes, serials, freed) {
  const end = created[serials.at(-1) ?? 0] + 1, level = new Float64Array(end + 3);
  for (const i of serials) {
    level[created[i]] += sizes[i];
    level[Math.min(freed(i), end) + 1] -= sizes[i];
  }
  return summed(level);
}

// The times at which some storages take more bytes than at any later time, or earlier one.
function highestTimes(step, sizes, serials, freed, latest) {
  const level = levels(step, sizes, serials, freed), times = [...new Set(serials.map((i) => step.created[i]))], found = [];
  let most = -1;
  for (const time of latest ? times.reverse() : times) {
    if (level[time] > most) found.push(time);
    most = Math.max(most, level[time]);
  }
  return found;
}

// While gradients flow through a segment (-1: none), during an operator or after it: whether a storage is live, and why.
function duringBackward(step, index, time, after) {
  const { created, freed, forward, needed, saved, segment, first, segments } = step;
  const live = (i) => created[i] <= time && freed[i] >= time + after && !step.isGradient[i];
  const waits = (i) => segments[first[i]].second >= time;
  return {
    always: (i) => i < forward && !needed[i] && !saved[i] && first[i] === NEVER && live(i),
    needed: (i) => (i >= forward || needed[i] > 0) && live(i),
    savedHere: (i) => index >= 0 && i < forward && segment[i] === index && saved[i] > 0 && live(i),
    isInput: (i) => first[i] < NEVER && (index >= 0 ? first[i] <= index : live(i) || waits(i)),
  };
}

// When memory can be highest; see `PeakFinder`. Yields a time, what storages hold then, and how many copies of each.
// base, held, probed: bytes of each storage without what its rank adds, with it, and at the rank of the recording.
function* peakCandidates(step, { base, held, probed }) {
  const { created, freed, unsaved, forward, needed, onContext, saved, segment, first, segments, within } = step, count = created.length;
  const sum = (serials, bytes) => serials.reduce((whole, i) => whole + bytes(i), 0);
  const forwards = serialsWhere(forward, () => true), backward = serialsWhere(count, (i) => i >= forward && !step.isGradient[i]);
  const inForward = levels(step, held, forwards, (i) => (first[i] < NEVER ? NEVER : needed[i] ? Math.max(unsaved[i], freed[i]) : unsaved[i]));
  for (const time of highestTimes(step, probed, forwards, (i) => unsaved[i], true).reverse()) {
    const copies = (i) => (i < forward && created[i] <= time && (unsaved[i] >= time || first[i] < NEVER || (needed[i] > 0 && freed[i] >= time)) ? 1 : 0);
    yield { time, bytes: inForward[time], copies };
  }
  // What segments bring back, and their inputs, are added where they are live; all else is while it is not freed.
  const others = serialsWhere(count, (i) => !step.isGradient[i] && (i >= forward || needed[i] || (!saved[i] && first[i] === NEVER)));
  const ofOthers = levels(step, held, others, (i) => freed[i]), ending = new Float64Array(ofOthers.length);
  for (const i of others) if (freed[i] < ending.length) ending[freed[i]] += held[i];
  const ofInputs = (why) => sum(step.inputs, (i) => (why.isInput(i) && !why.needed(i) && !why.savedHere(i) ? held[i] : 0));
  for (const index of [...new Set(backward.map((i) => segment[i]))].sort((one, other) => one - other)) {
    const own = backward.filter((i) => segment[i] === index), times = new Set();
    for (const ends of [freed, step.soonest]) for (const latest of [false, true]) highestTimes(step, probed, own, (i) => ends[i], latest).forEach((time) => times.add(time));
    for (const time of [...times].sort((one, other) => one - other)) {
      const why = duringBackward(step, index, time, 0);
      const copies = (i) => (why.savedHere(i) ? 1 + (needed[i] && onContext[i]) : why.always(i) || why.needed(i) || why.isInput(i) ? 1 : 0);
      const back = sum(within[index] ?? [], (i) => (!why.savedHere(i) ? 0 : !needed[i] ? held[i] : onContext[i] ? base[i] : 0));
      yield { time, bytes: ofOthers[time] + ofInputs(why) + back, copies };
    }
  }
  for (const [index, { second, last, end }] of segments.entries()) {
    if (second < 0 || last < 0) continue;
    const before = duringBackward(step, index, second, 1), again = within[index].filter((i) => created[i] <= last);
    const outside = ofOthers[second] - ending[second] + sum(step.inputs, (i) => (before.isInput(i) && !before.needed(i) ? held[i] : 0)) - sum(within[index], (i) => (before.always(i) ? held[i] : 0));
    for (const time of highestTimes(step, probed, again, (i) => Math.min(unsaved[i], end), true).reverse()) {
      const ran = (i) => i < forward && segment[i] === index && created[i] <= Math.min(last, time), isThere = (i) => unsaved[i] >= time || (saved[i] > 0 && freed[i] >= time);
      const isOutside = (i) => before.needed(i) || before.isInput(i) || (before.always(i) && !(i < forward && segment[i] === index));
      const copies = (i) => (isOutside(i) || (ran(i) && isThere(i)) ? (ran(i) && needed[i] && onContext[i] ? 2 : 1) : 0);
      yield { time: second, bytes: outside + sum(again, (i) => copies(i) * base[i] + (copies(i) ? held[i] - base[i] : 0) - (isOutside(i) ? held[i] : 0)), copies };
    }
  }
}

// Bytes at the peak of a step with a number of checkpointed layers, at any rows and length; see `MemoryModel`.
// settings: {rank, optimizer, gpus, sharding, accumulates}
class StepBytes {
  constructor(model, recorded, settings, level) {
    this.step = checkpointedStep(onShards(recorded, settings), level, settings.accumulates);
    const states = shardedStates(model.states[settings.optimizer], settings), ranks = [...model.highest].map((highest) => Math.min(settings.rank, highest));
    const ranked = (of) => ranks.reduce((sum, rank, i) => sum + rank * of(i), 0);
    this.accumulates = settings.accumulates;
    this.rankOf = (module) => (module < 0 ? 1 : ranks[module]);
    this.between = states.others + ranked((i) => states.weights[i] + states.optimizer[i] + (states.buckets[i] ?? states.buckets[0])) + states.fixed.reduce((sum, value) => sum + value, 0);
    this.optimizerStep = states.other_gradients + ranked((i) => states.weights[i] + states.scratch[i]);
    this.signals = ranked((i) => states.signals[i]);
    this.raised = 1 + (this.step.segments.length ? CHECKPOINTING_MARGIN : 0);
  }

  // Bytes beside those between steps, and when; nothing is recorded of the optimizer's step.
  highest(rows, length) {
    const { step, rankOf } = this, grown = factors(step, rows, length), count = step.created.length;
    const base = new Float64Array(count), held = new Float64Array(count), probed = new Float64Array(count), slope = (i) => roundToEven(step.slope[i] * grown[step.kind[i]]);
    for (let i = 0; i < count; i++) {
      base[i] = roundUp(roundToEven(step.base[i] * grown[step.kind[i]]), step.blockBytes);
      held[i] = base[i] + slope(i) * rankOf(step.target[i]);
      probed[i] = base[i] + RECORDED_RANK * slope(i);
    }
    let highest = this.optimizerStep, found = null;
    for (const candidate of peakCandidates(step, { base, held, probed })) {
      const gradients = this.gradients(candidate).reduce((sum, [serial, module]) => sum + (module < 0 ? base[serial] : slope(serial) * rankOf(module)), 0);
      const bytes = candidate.bytes + gradients;
      if (bytes > highest || (bytes === highest && !found)) [highest, found] = [bytes, candidate];
    }
    return { highest, found, grown };
  }

  gradients({ time }) {
    return this.step.gradients.filter(([serial]) => this.accumulates || this.step.created[serial] <= time);
  }

  peak(rows, length) {
    return Math.ceil((this.between + this.highest(rows, length).highest) * this.raised) + this.signals;
  }

  // What can be the peak between these batches: bytes of each kind of storage, and those that do not grow.
  lookAt(shapes) {
    const { step, rankOf } = this;
    this.moments = [{ amounts: step.kinds.map(() => 0), fixed: this.optimizerStep }];
    for (const [rows, length] of shapes) {
      const { highest, found, grown } = this.highest(rows, length);
      if (!found) continue;
      const amounts = step.kinds.map(() => 0);
      for (let i = 0; i < step.created.length; i++) {
        const copies = found.copies(i);
        if (copies) amounts[step.kind[i]] += copies * step.base[i] + step.slope[i] * rankOf(step.target[i]);
      }
      for (const [serial, module] of this.gradients(found)) amounts[step.kind[serial]] += module < 0 ? step.base[serial] : step.slope[serial] * rankOf(module);
      this.moments.push({ amounts, fixed: Math.max(highest - amounts.reduce((sum, amount, kind) => sum + amount * grown[kind], 0), 0) });
    }
  }

  at(rows, length) {
    const grown = factors(this.step, rows, length);
    const highest = Math.max(...this.moments.map(({ amounts, fixed }) => amounts.reduce((sum, amount, kind) => sum + amount * grown[kind], fixed)));
    return Math.ceil((this.between + highest) * this.raised - NOISE) + this.signals;
  }
}

// Bytes of the parts that a step may have; see `PlanBytes`. most: [rows, length], the largest that will be asked for.
class PlanBytes {
  constructor(model, step, settings, most) {
    Object.assign(this, { model, step, settings, most });
    this.layers = step.segments.filter(({ saved }) => saved.length).length;
    this.levels = [...new Set(Array.from({ length: MOST_LEVELS + 1 }, (_, i) => roundToEven((this.layers * i) / MOST_LEVELS)))];
    this.known = new Map();
  }

  level(layers) {
    if (!this.known.has(layers)) {
      const [rows, length] = this.most, least = Math.min(8, length), found = new StepBytes(this.model, this.step, this.settings, layers);
      const lengths = new Set([0, 1, 2, 3].map((i) => roundToEven(least * (length / least) ** (i / 3))));
      found.lookAt([...new Set([1, rows])].flatMap((count) => [...lengths].map((tokens) => [count, tokens])));
      this.known.set(layers, found);
    }
    return this.known.get(layers);
  }

  at(rows, length, layers) {
    return this.level(layers).at(rows, length);
  }

  // See `fewest_checkpointed`.
  fewestCheckpointed(limit) {
    const peak = (layers) => new StepBytes(this.model, this.step, this.settings, layers).peak(...this.most);
    let low = 0, high = this.layers, above = peak(low);
    if (!high || above <= limit) return 0;
    let within = peak(high);
    if (within > limit) return within < above ? high : 0;
    while (high - low > 1) {
      const part = Math.ceil(((above - limit) / (above - within)) * (high - low)), layers = low + Math.min(Math.max(part, 1), high - low - 1), found = peak(layers);
      if (found <= limit) [high, within] = [layers, found];
      else [low, above] = [layers, found];
    }
    return high;
  }
}

// Seconds of a part, by counted work and published rates; see `PartSeconds`.
function partSeconds(model, step, layers, flops) {
  const [weights, width] = model.products, ofToken = (WORK * weights) / flops, attention = (WORK * Math.max(layers, 1) * width * 2) / flops;
  const launches = LAUNCH_SECONDS * step.created.at(-1);
  const seconds = (rows, length, again) => Math.max(rows * length * (ofToken + attention * length), launches) * (1 + (SECOND_RUN * again) / Math.max(layers, 1));
  return { seconds, filling: Math.trunc(launches / Math.max(ofToken, 1e-30)) };
}

// The parts of a step whose rows have these lengths, that take the least seconds within a limit; null where a row does
// not fit alone. See `plan_parts`. priced: {layers, seconds} of a part, or null.
function planParts(lengths, priced) {
  const longest = [...lengths].sort((one, other) => other - one), count = longest.length;
  if (!priced(1, longest[0])) return null;
  const least = [0], starts = [0];
  for (let end = 1; end <= count; end++) {
    least[end] = NEVER;
    for (let start = 0; start < end; start++) {
      const part = priced(end - start, longest[start]), total = part ? least[start] + part.seconds : NEVER;
      if (total < least[end]) [least[end], starts[end]] = [total, start];
    }
  }
  const parts = [];
  for (let end = count; end; end = starts[end]) parts.push({ rows: end - starts[end], length: longest[starts[end]], ...priced(end - starts[end], longest[starts[end]]) });
  return parts.reverse();
}

// What steps take whose rows have these lengths; see `StepsOfLengths`. `pause` lets the page live meanwhile.
// room: {limit} of a step in bytes; flops: of the card in a second; order: a state of PCG64.
async function stepsOfLengths(model, step, settings, lengths, { rows, limit, flops, order }, pause = () => {}) {
  const longest = lengths.reduce((most, length) => Math.max(most, length)), bytes = new PlanBytes(model, step, settings, [rows, longest]), every = bytes.levels.at(-1);
  const { seconds, filling } = partSeconds(model, step, bytes.layers, flops);
  const repeated = Array.from({ length: Math.max(lengths.length, rows) }, (_, i) => lengths[i % lengths.length]), drawn = shuffled(repeated, order);
  const steps = Math.min(Math.floor(drawn.length / rows), MOST_STEPS), known = new Map();
  for (const level of bytes.levels) {
    bytes.level(level);
    await pause();
  }
  const rectangleLayers = bytes.fewestCheckpointed(limit);
  const priced = (height, length) => {
    const key = height * 2 ** 30 + length;
    if (!known.has(key)) {
      const layers = bytes.levels.find((level) => bytes.at(height, length, level) <= limit);
      known.set(key, layers === undefined ? null : { layers, seconds: seconds(height, length, layers) });
    }
    return known.get(key);
  };
  const found = { steps, longest, tooLong: 0, rectangleTooLarge: 0, rectangleLayers, rectanglePeak: 0, partsPeak: null, filling };
  let parts = 0, tokens = 0, ofLayers = 0, padding = 0, real = 0, spent = 0, whole = 0;
  for (let number = 0; number < steps; number++) {
    if (number % 50 === 0) await pause();
    const batch = drawn.slice(number * rows, (number + 1) * rows), most = Math.max(...batch), own = batch.reduce((sum, length) => sum + length, 0);
    found.rectangleTooLarge += bytes.at(rows, most, every) > limit;
    found.rectanglePeak = Math.max(found.rectanglePeak, bytes.at(rows, most, rectangleLayers));
    const planned = planParts(batch, priced);
    if (!planned) {
      found.tooLong += 1;
      continue;
    }
    spent += planned.reduce((sum, part) => sum + part.seconds, 0);
    whole += seconds(rows, most, rectangleLayers);
    padding += rows * most - own;
    real += own;
    parts += planned.length;
    for (const part of planned) {
      tokens += part.rows * part.length;
      ofLayers += part.rows * part.length * part.layers;
      found.partsPeak = Math.max(found.partsPeak, bytes.at(part.rows, part.length, part.layers));
    }
  }
  let fits = 0, most = longest;
  while (fits < most) {
    const middle = Math.ceil((fits + most) / 2);
    if (bytes.at(1, middle, every) <= limit) fits = middle;
    else most = middle - 1;
  }
  return { ...found, fits, parts: parts / Math.max(steps - found.tooLong, 1), layers: ofLayers / Math.max(tokens, 1), time: whole ? spent / whole : 1, paddingSaved: padding ? (padding - (tokens - real)) / padding : 0 };
}

// Bytes that tensors of a step may take beside the frozen model; see `Outlook.room_for_tensors`. use: with all layers
// checkpointed, on the batch that was asked for.
function roomForTensors(model, card, settings, use) {
  const frozen = loadedSizes(model, settings).reduce((sum, size) => sum + size, 0), reserve = use.reserve / (use.total - use.reserve);
  return card.memory - (frozen + card.context + card.workspace) - card.memory * (1 - (1 - settings.slack) / (1 + reserve));
}
