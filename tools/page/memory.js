// What a LoRA fine-tune takes of a card: the arithmetic of cost/growth.py, cost/model.py, cost/allocator.py and
// cost/card_use.py, to the byte. A model is what `tools/make_page.py` writes of a recorded step.

const MIB = 2 ** 20, NEVER = Infinity;
const CHECKPOINTING_MARGIN = 0.005;
const LIVE_PARAMETERS = 1e9; // what DeepSpeed's ZeRO-3 gathers at the most
const MERGED_FILE_BYTES = 50e9; // the largest file of a merged model, by transformers' default
const KINDS = ["frozen", "adapters", "held", "inputs", "temporary", "workspace"];

// The arrays and the text of a model, from what is in the page.
async function unpackModel(base64) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const bytes = await new Response(stream).arrayBuffer(), view = new DataView(bytes);
  const start = 4 + view.getUint32(0, true), model = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, start - 4)));
  const arrays = [];
  let offset = start;
  for (const [owner, name, ...how] of model.arrays) {
    const values = how.length === 1 ? arrays[how[0]].slice() : numbers(view, offset, how);
    if (how.length > 1) offset += how[0] * how[3];
    arrays.push(values);
    const place = owner < 0 ? model : model.steps[owner];
    place[name] = place[name] ? Float64Array.from([...place[name], ...values]) : values; // the forward pass, then the backward pass
  }
  model.steps.forEach(restore);
  return model;
}

// Numbers of so many bytes, the lowest bytes of all first, or of floating point; each was told by the one a lag before.
function numbers(view, offset, [width, lag, times, count]) {
  const values = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    if (width === 8) values[i] = view.getFloat64(offset + 8 * i, true);
    else {
      for (let plane = width - 1; plane >= 0; plane--) values[i] = 256 * values[i] + view.getUint8(offset + plane * count + i);
      if (values[i] >= 2 ** (8 * width - 1)) values[i] -= 2 ** (8 * width);
    }
  }
  for (let time = 0; time < times; time++) for (let i = lag; i < count; i++) values[i] += values[i - lag];
  return values;
}

const summed = (values) => {
  for (let i = 1; i < values.length; i++) values[i] += values[i - 1];
  return values;
};

// Times from spans, and the tables of a recorded step.
function restore(step) {
  const created = summed(step.created), count = created.length;
  step.forward = 0;
  while (step.forward < count && created[step.forward] <= step.forwardEnd) step.forward++;
  const backward = new Map(); // when the backward pass of each segment begins, from which some times are told
  for (let i = count - 1; i >= step.forward; i--) if (step.segment[i] >= 0) backward.set(step.segment[i], created[i]);
  const anchor = (i) => Math.max(created[i], backward.get(step.segment[i]) ?? 0);
  for (const name of ["freed", "unsaved"])
    step[name] = step[name].map((span, i) => (span === -1 ? NEVER : span < -1 ? created[i] - span - 2 : anchor(i) + span));
  const table = (name, width) => {
    const columns = Array.from({ length: width }, (_, place) => summed(step[`${name} ${place}`]));
    return Array.from(columns[0], (_, row) => columns.map((column) => column[row]));
  };
  step.segments = table("segments", 5).map(([first, end, second, last, backwardEnd]) => ({ first, end, second, last, backwardEnd, inputs: [], saved: [] }));
  for (const [serial, number] of table("inputs", 2)) step.segments[number].inputs.push(serial);
  step.saved.forEach((own, serial) => own && step.segments[step.segment[serial]].saved.push(serial));
  for (const [serial, number] of table("savedOutside", 2)) step.segments[number].saved.push(serial);
  step.gradients = table("gradients", 3); // serial number, module or -1, when it is added
  step.gathers = table("gathers", 1).flat(); // what is there only where FSDP2 gathers it
}

const roundUp = (value, multiple) => Math.ceil(value / multiple) * multiple;

function roundToEven(value) {
  const low = Math.floor(value), rest = value - low;
  return rest === 0.5 ? low + (low % 2) : Math.round(value);
}

const power = (value, exponent) => (exponent === 0 ? 1 : exponent === 1 ? value : exponent === 2 ? value * value : value ** exponent);

// By what each kind of storage grows from the recorded batch to another; see `Growth.factor`.
function factors(step, rows, length) {
  const [recordedRows, recorded] = step.recorded, ratio = step.lengthRatio;
  const tile = step.tiles && tileTokens(step.tiles, rows, length);
  return step.kinds.map(([rowPower, lengthPower, missing, multiple, rounded, tiled]) => {
    if (step.tiles && tiled > 0) return tile / tiled;
    if (rows === recordedRows && length === recorded) return 1;
    let growth = 1;
    if (multiple > 1) {
      const up = Math.ceil(length / multiple) / Math.ceil(recorded / multiple);
      growth = (rounded * up + ((1 - rounded) * length) / recorded) * power(length / recorded, lengthPower);
    } else if (missing > 0) {
      growth = (length - missing) / (recorded - missing);
    } else if (ratio !== 1) {
      const whole = Math.floor(lengthPower + 1e-9);
      const share = (power(ratio, lengthPower - whole) - ratio) / (1 - ratio);
      growth = power(length / recorded, whole) * (share + ((1 - share) * length) / recorded);
    }
    return power(rows / recordedRows, rowPower) * growth;
  });
}

function tileTokens([ofToken, ofRow, parts, least, most], rows, length) {
  const tokens = roundToEven(rows * (ofToken * length + ofRow));
  return Math.max(Math.min(Math.max(Math.ceil(tokens / parts), least), tokens, most || tokens), 1);
}

// Bytes of each recorded storage at this rank on all modules.
function storageSizes(model, step, { rank, rows, length }) {
  const grown = factors(step, rows, length), sizes = new Float64Array(step.created.length);
  const ofModule = (module) => (module < 0 ? 1 : Math.min(rank, model.highest[module]));
  const bytes = (i, module) => {
    const factor = grown[step.kind[i]];
    return roundUp(roundToEven(step.base[i] * factor), step.blockBytes) + roundToEven(step.slope[i] * factor) * ofModule(module);
  };
  for (let i = 0; i < sizes.length; i++) sizes[i] = bytes(i, step.target[i]);
  for (const [serial, module] of step.gradients) sizes[serial] = bytes(serial, module);
  return sizes;
}

// torch's caching allocator, without memory; see `CachingAllocator`.
class Allocator {
  constructor(expandable) {
    this.last = expandable ? [null, null] : null; // by pool, the block at the end of its segment
    this.allocated = this.reserved = this.peakAllocated = this.peakReserved = 0;
    this.blocks = new Map();
    this.free = [[], []]; // [size, address], the smallest first: large blocks, small blocks
    this.nextAddress = 0;
    this.byKind = KINDS.map(() => 0);
    this.atPeak = this.byKind;
  }

  place(list, size, address) {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1, entry = list[middle];
      if (entry[0] < size || (entry[0] === size && entry[1] < address)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  insert(pool, size, address) {
    const list = this.free[pool];
    list.splice(this.place(list, size, address), 0, [size, address]);
  }

  remove(pool, size, address) {
    const list = this.free[pool];
    list.splice(this.place(list, size, address), 1);
  }

  allocate(bytes, kind) {
    const size = roundUp(bytes, 512), pool = size <= MIB ? 1 : 0, list = this.free[pool];
    const index = this.place(list, size, -1);
    const address = index < list.length ? list.splice(index, 1)[0][1] : this.newBlock(size, pool);
    const block = this.blocks.get(address), left = block.size - size;
    block.free = false;
    block.kind = kind;
    if (left >= 512 && (pool === 1 || left > MIB)) {
      const rest = address + size;
      this.blocks.set(rest, { size: left, pool, free: true, before: address, after: block.after });
      if (block.after !== null) this.blocks.get(block.after).before = rest;
      else if (this.last) this.last[pool] = rest;
      this.insert(pool, left, rest);
      block.size = size;
      block.after = rest;
    }
    this.allocated += block.size;
    this.byKind[kind] += block.size;
    if (this.allocated > this.peakAllocated) {
      this.peakAllocated = this.allocated;
      this.atPeak = this.byKind.slice();
    }
    return address;
  }

  release(address) {
    let block = this.blocks.get(address);
    const { before, after, pool } = block;
    this.allocated -= block.size;
    this.byKind[block.kind] -= block.size;
    if (after !== null && this.blocks.get(after).free) {
      this.remove(pool, this.blocks.get(after).size, after);
      this.join(address, block, after);
    }
    if (before !== null && this.blocks.get(before).free) {
      const other = this.blocks.get(before);
      this.remove(pool, other.size, before);
      this.join(before, other, address);
      address = before;
      block = other;
    }
    block.free = true;
    this.insert(pool, block.size, address);
  }

  join(address, block, after) {
    const other = this.blocks.get(after);
    this.blocks.delete(after);
    block.size += other.size;
    block.after = other.after;
    if (other.after !== null) this.blocks.get(other.after).before = address;
    else if (this.last) this.last[block.pool] = address;
  }

  newBlock(size, pool) {
    let unit = pool ? 2 * MIB : 20 * MIB;
    if (this.last) return this.expanded(size, pool, unit);
    if (!pool && size >= 10 * MIB) unit = roundUp(size, 2 * MIB);
    const address = this.nextAddress;
    this.blocks.set(address, { size: unit, pool, free: false, before: null, after: null });
    this.nextAddress += unit;
    this.grow(unit);
    return address;
  }

  expanded(size, pool, unit) {
    const end = this.last[pool], tail = end === null ? null : this.blocks.get(end);
    let address = pool ? 0 : 2 ** 52, more;
    if (tail && tail.free) {
      this.remove(pool, tail.size, end);
      address = end;
      more = roundUp(size - tail.size, unit);
      tail.size += more;
    } else {
      more = roundUp(size, unit);
      if (tail) address = tail.after = end + tail.size;
      this.blocks.set(address, { size: more, pool, free: false, before: end, after: null });
    }
    this.last[pool] = address;
    this.grow(more);
    return address;
  }

  grow(bytes) {
    this.reserved += bytes;
    this.peakReserved = Math.max(this.peakReserved, this.reserved);
  }

  restartPeak() {
    this.peakAllocated = this.allocated;
    this.atPeak = this.byKind.slice();
  }

  emptyCache() {
    if (this.last) return;
    this.free = this.free.map((list) =>
      list.filter(([size, address]) => {
        const { before, after } = this.blocks.get(address);
        if (before !== null || after !== null) return true;
        this.reserved -= size;
        this.blocks.delete(address);
        return false;
      }),
    );
  }
}

// Allocations of tensors, sorted by time: {serials, kinds, order, gradients, others}; see `step_events`.
function inOrder(step, sizes, tensors, isGradient) {
  const used = tensors.filter(([serial]) => sizes[serial] > 0), count = used.length;
  const keys = used.map(([, born]) => 2 * born), events = used.map((_, i) => i);
  used.forEach(([, , died], i) => {
    if (died === NEVER) return;
    keys.push(2 * died + 1);
    events.push(-1 - i);
  });
  const most = 2 ** 18, sorted = Float64Array.from(keys, (key, i) => key * most + i).sort(); // numbers sort faster than pairs
  const order = Array.from(sorted, (packed) => events[packed % most]);
  const staying = [...Array(count).keys()].filter((i) => used[i][2] === NEVER);
  return {
    sizes: used.map(([serial]) => Math.trunc(sizes[serial])),
    kinds: used.map(([, , , kind]) => kind),
    order,
    gradients: staying.filter((i) => isGradient.has(used[i][0])),
    others: staying.filter((i) => !isGradient.has(used[i][0])),
  };
}

const [FROZEN, ADAPTERS, HELD, INPUTS, TEMPORARY, WORKSPACE] = KINDS.keys();

// A step in which the lowest `checkpointed` layers run again; with `accumulates`, gradients are there already.
function stepEvents(step, sizes, checkpointed, accumulates) {
  const { created, unsaved, forward } = step, count = created.length;
  const kept = step.segments.slice(0, checkpointed);
  const scale = 2 + Math.max(0, ...kept.map(({ first, end }) => end - first));
  const needed = step.needed.map(Boolean), savedAgain = new Uint8Array(count), recorded = step.freed.slice();
  for (const segment of step.segments.slice(checkpointed)) for (const serial of segment.saved) needed[serial] = 1;
  kept.forEach((segment, index) => segment.saved.forEach((serial) => (savedAgain[serial] |= step.segment[serial] === index)));
  if (accumulates) for (const [serial, , added] of step.gradients) recorded[serial] = added;
  const isGradient = new Set(accumulates ? [] : step.gradients.map(([serial]) => serial));
  const freed = recorded.map((time, i) => (i < forward && !needed[i] ? unsaved[i] : time));
  const again = kept.map((segment, index) => [segment, index]).filter(([segment]) => segment.last >= 0 && segment.second >= 0);
  const isInput = new Uint8Array(count);
  for (const [{ inputs, backwardEnd }] of again)
    for (const serial of inputs) {
      isInput[serial] = 1;
      freed[serial] = Math.max(freed[serial], backwardEnd);
    }
  const parameters = new Set(step.gradients.map(([serial]) => serial)), tensors = [];
  for (let i = 0; i < count; i++) {
    if (i >= forward && !needed[i] && !isGradient.has(i)) continue;
    const kind = parameters.has(i) ? ADAPTERS : i >= forward ? TEMPORARY : isInput[i] ? INPUTS : needed[i] ? HELD : TEMPORARY;
    tensors.push([i, scale * created[i], scale * freed[i], kind]);
  }
  for (const [{ first, second, last }, index] of again) {
    const start = scale * second + 1;
    for (let i = 0; i < forward; i++) {
      if (step.segment[i] !== index || created[i] > last) continue;
      const died = savedAgain[i] ? scale * recorded[i] : start + Math.min(unsaved[i], last) - first;
      tensors.push([i, start + created[i] - first, died, savedAgain[i] ? HELD : TEMPORARY]);
    }
  }
  return inOrder(step, sizes, tensors, isGradient);
}

// A forward pass in which nothing is saved.
function evaluationEvents(step, sizes) {
  const tensors = [];
  for (let i = 0; i < step.forward; i++) {
    const died = step.unsaved[i] > step.forwardEnd ? NEVER : step.unsaved[i];
    tensors.push([i, step.created[i], died, TEMPORARY]);
  }
  return inOrder(step, sizes, tensors, new Set(step.gradients.map(([serial]) => serial)));
}

// What adapters and their optimizer hold on one of several GPUs; see `Shards.of`.
function shardedStates(states, { gpus, sharding }) {
  if (gpus === 1) return states;
  const up = (values, by) => values.map((value) => Math.ceil(value * by));
  if (sharding === "ddp")
    return {
      ...states,
      buckets: up(states.weights, 1),
      fixed: states.fixed.map((value, i) => value + Math.ceil(states.unranked[i])),
      others: states.others + Math.ceil(states.other_weights),
    };
  const share = (value) => Math.ceil(value / gpus);
  const shared = { ...states, others: share(states.others), other_gradients: share(states.other_gradients) };
  for (const name of ["weights", "optimizer", "scratch", "fixed"]) shared[name] = states[name].map(share);
  if (sharding === "zero3") shared.optimizer = states.optimizer.map((value, i) => share(value + states.weights[i]));
  return shared;
}

// The step on one of several GPUs: what it gathers, and its share of the gradients; see `with_gathers`.
function onShards(step, { gpus, sharding, accumulates }) {
  const base = step.base.slice(), slope = step.slope.slice(), gathers = gpus > 1 && sharding === "fsdp2";
  const shares = gpus > 1 && (sharding === "zero3" || (gathers && !accumulates));
  if (!gathers) for (const serial of step.gathers) base[serial] = slope[serial] = 0;
  for (const [serial] of shares ? step.gradients : []) {
    base[serial] = Math.ceil(base[serial] / gpus);
    slope[serial] /= gpus;
  }
  return { ...step, base, slope };
}

// Bytes of each storage of the frozen model on one GPU; see `Shards.loaded`.
function loadedSizes(model, { gpus, sharding, stream }) {
  if (stream) return withoutStreamed(model, stream);
  const whole = model.frozen.reduce((sum, size) => sum + size, 0);
  if (sharding === "ddp" || gpus === 1) return [...model.frozen];
  const shards = [...model.frozen].map((size) => Math.ceil(size / gpus));
  return sharding === "zero3" ? [...shards, Math.trunc(whole * Math.min(LIVE_PARAMETERS / model.parameters, 1)), 2 * model.products[1] ** 2] : shards;
}

// The same where the frozen weights of so many layers stream from main memory; see `BaseLayers.on_device`.
function withoutStreamed({ frozen, base }, stream) {
  const away = new Map(base.sizes.map(([size, times]) => [size, times * Math.max(stream - base.onDevice, 0)]));
  return [...frozen].filter((size) => !(away.get(size) > 0 && away.set(size, away.get(size) - 1)));
}

const layerBytes = ({ base }) => base.sizes.reduce((sum, [size, times]) => sum + size * times, 0);

// Bytes of modules, shared out among their factors as weights are.
function ofFactors(step, parameters, ofModules, others) {
  const whole = ofModules.map(() => 0);
  step.gradients.forEach(([, module], i) => module >= 0 && (whole[module] += parameters[i]));
  return step.gradients.map(([, module], i) =>
    module < 0 ? others(i) : parameters[i] * (ofModules[module] / Math.max(whole[module], 1)),
  );
}

// The batches of an evaluation: rows, batches whose logits are kept, and bytes of a batch's logits; see `Evaluation`.
function evaluationOf({ words }, { rows, length, evalRows, keepLogits }) {
  const each = evalRows || rows, kept = Math.ceil((keepLogits || 0) / each);
  return { rows: each, kept, output: kept ? 4 * words * each * length : 0 };
}

// Bytes of main memory at each moment, and those that resuming loads onto each of several cards; see `Files`.
function mainMemory(model, ranks, { optimizer, gpus, sharding, stream }) {
  const states = model.states[optimizer], whole = model.frozen.reduce((sum, size) => sum + size, 0);
  const times = (values) => ranks.reduce((sum, rank, i) => sum + (values[i] ?? values[0]) * rank, 0), adapted = (values) => ranks.reduce((sum, rank, i) => sum + (rank > 0 ? values[i] : 0), 0);
  const weights = times(states.weights) + adapted(states.unranked) + states.other_weights;
  const state = states.others + times(states.weights) + times(states.optimizer) + adapted(states.fixed) - weights;
  const several = gpus > 1 && sharding === "ddp", shared = gpus > 1 && sharding !== "ddp", streamed = (stream ?? 0) * layerBytes(model);
  const resumed = several ? 0 : sharding === "zero3" && gpus > 1 ? state / gpus : state;
  const main = [shared ? whole : 0, 0, 0, 0, weights + (shared && sharding === "fsdp2" ? whole : 0), resumed, Math.min(whole - streamed, MERGED_FILE_BYTES)];
  return { main: main.map((bytes) => bytes + streamed), resumed: several ? state : 0 };
}

// Two steps and an evaluation through the allocator, and what the card must hold; see `replay` and `card_use`.
// settings: {rank, rows, length, optimizer, gpus, sharding, checkpointed, accumulates, expandable, slack, stream, evalRows,
// keepLogits}
function cardUse(model, recorded, card, settings) {
  const step = onShards(recorded, settings), states = shardedStates(model.states[settings.optimizer], settings), loaded = loadedSizes(model, settings);
  const ranks = [...model.highest].map((highest) => Math.min(settings.rank, highest));
  const sizes = storageSizes(model, step, settings), parameters = step.gradients.map(([serial]) => sizes[serial]);
  const ranked = (values) => ranks.map((rank, i) => (values[i] ?? values[0]) * rank);
  const allocator = new Allocator(settings.expandable);
  const keep = (values, kind) => [...values].filter((size) => size > 0).map((size) => allocator.allocate(Math.trunc(size), kind));
  keep(loaded, FROZEN);
  keep(ofFactors(step, parameters, ranked(states.weights), (i) => parameters[i]), ADAPTERS);
  keep([states.others, ...ranked(states.signals.map((value, i) => value + (states.buckets[i] ?? states.buckets[0])))], ADAPTERS);
  const passes = [stepEvents(step, sizes, settings.checkpointed, false)];
  if (settings.accumulates) passes.push(stepEvents(step, sizes, settings.checkpointed, true));
  keep([card.workspace / 2, card.workspace / 2], WORKSPACE);
  let gradients = [];
  const play = (events) => {
    const addresses = [];
    for (const event of events.order) {
      if (event >= 0) addresses[event] = allocator.allocate(events.sizes[event], events.kinds[event]);
      else allocator.release(addresses[-1 - event]);
    }
    for (const tensor of events.others) allocator.release(addresses[tensor]);
    gradients.push(...events.gradients.map((tensor) => addresses[tensor]));
  };
  const optimizer = ofFactors(step, parameters, ranked(states.optimizer), () => 0);
  const scratch = [states.other_gradients, ...ofFactors(step, parameters, ranked(states.scratch), () => 0)];
  const peaks = [];
  for (let number = 0; number < 2; number++) {
    allocator.restartPeak();
    passes.forEach(play);
    if (number === 0) keep([...optimizer.flatMap((size) => [size / 2, size / 2]), ...ranks.map((rank, i) => (rank > 0 ? states.fixed[i] : 0))], ADAPTERS);
    for (const address of keep(scratch, ADAPTERS).concat(gradients)) allocator.release(address);
    gradients = [];
    peaks.push([allocator.peakAllocated, allocator.atPeak]);
  }
  const [[first], [later]] = peaks, [allocated, parts] = peaks[first >= later ? 0 : 1], between = allocator.allocated;
  allocator.restartPeak();
  allocator.emptyCache();
  const evaluated = evaluationOf(model, settings), release = (addresses) => addresses.forEach((address) => allocator.release(address));
  const before = keep([(evaluated.kept - 1) * evaluated.output], TEMPORARY);
  play(evaluationEvents(step, evaluated.rows === settings.rows ? sizes : storageSizes(model, step, { ...settings, rows: evaluated.rows })));
  release(keep([evaluated.output, evaluated.kept * evaluated.output], TEMPORARY));
  release(before);
  const base = loaded.reduce((sum, size) => sum + size, 0), evaluation = allocator.peakAllocated;
  const merging = between + model.merged * Math.max(0, ...model.weights.map((weights, i) => (ranks[i] ? weights : 0)));
  const files = mainMemory(model, ranks, settings), resumed = between + files.resumed;
  const tensors = [first, Math.max(first, later), evaluation, between, resumed, merging].map((peak) => peak - card.workspace);
  const margin = Math.trunc((settings.checkpointed && step.segments.length ? CHECKPOINTING_MARGIN : 0) * (allocated - base));
  const reserved = allocator.peakReserved, total = reserved + card.context + margin, spare = card.memory - total;
  const reserve = reserved - Math.max(allocated, evaluation);
  const verdict = spare >= settings.slack * card.memory ? "fits" : spare + reserve >= 0 ? "may not fit" : "does not fit";
  return { allocated, evaluation, reserved, reserve, margin, total, spare, verdict, moments: [base, ...tensors], main: files.main, parts: evaluation > allocated ? allocator.atPeak : parts };
}

// The length of the recording that tells of this one; see `StoredStep._shapes`.
function usualLength(model, length) {
  const below = Math.max(0, ...model.windows.filter((window) => window <= length));
  const [rest, multiple] = below && !model.isEager && length % 16 ? [4, 512] : [32, 256];
  const ends = [...model.windows, ...(model.positions === null ? [] : [model.positions + 1])].filter((end) => end > length);
  const most = Math.min(2 ** 24, ...ends.map((end) => end - 1)), modulo = (value) => ((value % multiple) + multiple) % multiple;
  let usual = Math.max(2080, 2 * below);
  usual += modulo(rest - usual);
  if (usual > most) usual = most - modulo(most - rest);
  return usual >= Math.max(2 * below, rest) ? usual : length;
}

// The recorded batch that tells of this one; see `StoredStep._shapes`. None where no recording does.
function recordedStep(model, savers, rows, length) {
  const known = (name) => model.steps.filter((step) => step.savers === name), those = known(savers);
  const own = savers === "free" && !those.length ? known("none") : those; // no saver lowers its peak
  const exact = own.find((step) => step.shape[1] === length && step.shape[0] === (rows > 1 ? 4 : 1));
  if (model.byLength) return exact || null;
  return own.find((step) => step.shape[0] === 4 && step.shape[1] === usualLength(model, length)) || exact || null;
}
