// The form, and what it shows: verdict, bar, other ways, longest row, lines to paste. The state is the page's address.

const known = JSON.parse(document.getElementById("known").textContent);
const form = document.getElementById("form"), answer = document.getElementById("answer");
const DEFAULTS = {
  model: "llama-3.1-8b", bits: "nf4", trainer: "trl", card: "RTX 4090", length: 2048, rows: 2, rank: 16, checkpointing: "auto", savers: true,
  memory: 12, optimizer: "adamw", accumulation: 8, gpus: 1, sharding: "ddp", expandable: false, evalRows: 0, keepLogits: 0,
};
const OTHER = "another card"; // of which only the memory is known
const OPTIMIZERS = {
  adamw: "AdamW", adamw8bit: "AdamW, 8 bits", paged_adamw8bit: "AdamW, 8 bits, paged", adamw4bit: "AdamW, 4 bits", adafactor: "Adafactor", sgd: "SGD",
};
const IN_TRAINERS = { adamw: "adamw_torch", adamw8bit: "adamw_8bit", paged_adamw8bit: "paged_adamw_8bit", adamw4bit: "adamw_torch_4bit", adafactor: "adafactor", sgd: "sgd" };
const PARTS = [
  ["frozen", "frozen model"], ["adapters", "adapters, gradients, optimizer"], ["held", "activations kept for backward"],
  ["inputs", "inputs of checkpointed layers"], ["temporary", "logits and other temporary tensors"],
  ["reserve", "kept by the allocator"], ["context", "CUDA context and workspaces"], ["spare", "free"],
];
const MARKS = { fits: ["fits", "fits"], "may not fit": ["may not fit", "tight"], "does not fit": ["does not fit", "over"] };
const LONGEST = 131072;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const mark = (verdict, small) => element("span", { class: `mark ${MARKS[verdict][1]}${small ? " small" : ""}` }, MARKS[verdict][0]);
// The share of a card to leave free; see `slack_of`.
function slackOf(model, { bits, gpus, sharding, ...asked }) {
  const whole = gpus > 1 && sharding === "fsdp2" && bits !== "none" ? model.whole * (1 - 1 / gpus) : 0;
  const kinds = [bits, ...(gpus > 1 ? [sharding] : []), ...(model.keepsState ? ["states"] : [])];
  return Math.min(Math.max(...kinds.map((kind) => known.slack[kind])) + whole / cardOf(asked).memory, 0.95);
}
const percent = (share) => `${Math.round(100 * share)} %`;
const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(Math.abs(bytes) < 2 ** 30 ? 2 : 1)}\u00a0GiB`;
const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

// The address holds what differs from the defaults, so that an answer can be linked.
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const field = form.elements.namedItem(name), value = given.get(name);
    if (typeof usual === "boolean") field.checked = value === null ? usual : value === "yes";
    else field.value = value === null ? usual : value;
    if (field.tagName !== "SELECT") continue;
    const unknown = field.selectedIndex < 0;
    if (unknown) field.selectedIndex = 0;
    field.setCustomValidity(unknown ? `This page has no ${name} ${value}. Choose another.` : "");
  }
  document.getElementById("more").open ||= ["optimizer", "accumulation", "sharding", "expandable", "evalRows", "keepLogits"].some((name) => given.has(name));
}

function readForm() {
  const read = (name, usual) => {
    const field = form.elements.namedItem(name);
    return typeof usual === "boolean" ? field.checked : typeof usual === "number" ? (field.step ? Number(field.value) : Math.trunc(Number(field.value))) : field.value;
  };
  return Object.fromEntries(Object.entries(DEFAULTS).map(([name, usual]) => [name, read(name, usual)]));
}

function writeAddress(asked) {
  const changed = Object.entries(asked).filter(([name, value]) => value !== DEFAULTS[name]);
  const text = new URLSearchParams(changed.map(([name, value]) => [name, typeof value === "boolean" ? (value ? "yes" : "no") : value]));
  history.replaceState(null, "", `#${text}`);
}

const cardOf = ({ card, memory }) => (card === OTHER ? { ...known.cards[card], memory: Math.trunc(memory * 2 ** 30) } : known.cards[card]);
const option = ({ card, memory }) => (card === OTHER ? `--device-memory ${memory}GiB` : `--device ${JSON.stringify(card)}`);

const idOf = ({ model, bits, trainer }) => `${model}/${bits}/${trainer}`;
const unpacked = new Map();
async function modelOf(asked) {
  const id = idOf(asked);
  if (!unpacked.has(id)) unpacked.set(id, unpackModel(document.getElementById(id).textContent));
  return unpacked.get(id);
}

// What one way to train takes; null where no recording tells of it. Answers are kept for as long as the page is open.
const uses = new Map();
function use(model, asked, savers, checkpointed) {
  const { rank, rows, length, optimizer, gpus, expandable, stream, evalRows, keepLogits } = asked;
  const settings = { rank, rows, length, optimizer, gpus, expandable, stream, evalRows, keepLogits, checkpointed, slack: slackOf(model, asked), sharding: gpus > 1 ? asked.sharding : "ddp", accumulates: asked.accumulation > 1 };
  const card = cardOf(asked), key = JSON.stringify([idOf(asked), asked.card, card.memory, savers, settings]);
  if (!uses.has(key)) {
    const step = recordedStep(model, savers, rows, length);
    const layers = step ? Math.min(checkpointed, step.segments.length) : 0;
    uses.set(key, step && { savers, layers, of: step.segments.length, ...cardUse(model, step, card, { ...settings, checkpointed: layers }) });
  }
  return uses.get(key);
}

const pause = () => new Promise((resolve) => setTimeout(resolve));
const ALL = 1e6;

// The plan that the command chooses; see `Outlook.fitting`. Where none leaves enough to spare, the one that takes least.
async function planned(model, asked) {
  if (asked.checkpointing !== "auto") return use(model, asked, saversOf(asked), asked.checkpointing === "all" ? ALL : 0);
  const savers = asked.savers && needsLean(model, asked) ? "selective" : saversOf(asked), fits = (way) => way.verdict === "fits";
  const at = (layers) => use(model, asked, savers, layers), none = at(0);
  if (!none || fits(none) || !none.of) return none;
  await pause();
  const every = at(ALL), limit = (1 - slackOf(model, asked)) * cardOf(asked).memory;
  let layers = every.of;
  if (every.total <= limit && limit < none.total) layers = Math.max(1, Math.ceil(((none.total - limit) / (none.total - every.total)) * layers));
  for (; !fits(at(layers)) && layers < every.of; layers++) await pause();
  for (; layers > 1 && fits(at(layers - 1)); layers--) await pause();
  if (fits(at(layers))) return at(layers);
  const ways = [none, every], tight = ways.filter(({ verdict, spare }) => verdict !== "does not fit" && spare >= 0);
  return (tight.length ? tight : ways).reduce((least, way) => (way.total < least.total ? way : least));
}

const saversOf = (asked) => (asked.savers ? "free" : "none");

// Whether activations are checkpointed first: plain LoRA does not fit, and it takes less with them; see `Outlook.step`.
function needsLean(model, asked) {
  const at = (savers, layers) => use(model, { ...asked, rank: 8 }, savers, layers), plain = at("free", 0), lean = at("selective", 0);
  if (!plain || !lean || plain.verdict === "fits") return false;
  const [every, leanEvery] = [at("free", ALL).allocated, at("selective", ALL).allocated];
  return lean.allocated === plain.allocated ? leanEvery < every : lean.allocated < plain.allocated && leanEvery <= 1.01 * every;
}

// The time of a step as a share of plain LoRA's, rank 8 on all modules, without checkpointing; null where it is not known.
function timeOf(model, asked, way) {
  const { rows, length } = asked, card = cardOf(asked), [work, usual] = [way.savers, saversOf(asked)].map((savers) => workOf(model, savers, rows, length));
  if (!work || !usual) return null;
  const seconds = (layers) => stepSeconds(model, work, card, known.launch, asked, layers), whole = seconds(way.layers), forward = seconds(work.layers) - seconds(0);
  const copies = exposedSeconds(model, asked.stream, forward, whole - forward, card.bus);
  return (whole + copies) / stepSeconds(model, usual, card, known.launch, { ...asked, rank: 8 }, 0);
}

// The least number of streamed layers with which it fits, and all layers where these take less time: what is asked, and
// the way. Empty where the base cannot stream or that does not help; see `brought_by_streaming`.
async function streamedWays(model, asked, isLatest = () => true) {
  const { count, sizes, onDevice } = model.base, found = new Map();
  if (asked.gpus > 1 || !sizes.length) return [];
  const at = async (stream) => {
    const there = { ...asked, stream };
    if (!found.has(stream)) found.set(stream, { asked: there, way: await planned(model, there) });
    return found.get(stream);
  };
  const fits = async (stream) => isLatest() && (await at(stream)).way.verdict === "fits";
  if (!(await fits(count))) return [];
  const every = await at(count), least = asked.checkpointing === "auto" ? use(model, every.asked, every.way.savers, ALL) : every.way;
  let stream = Math.min(Math.max(count - Math.floor((least.spare - slackOf(model, asked) * cardOf(asked).memory) / layerBytes(model)), onDevice + 1), count);
  while (stream < count && isLatest() && !(await fits(stream))) stream++;
  while (stream > onDevice + 1 && (await fits(stream - 1))) stream--;
  const fewest = await at(stream), time = (each) => timeOf(model, each.asked, each.way);
  return time(every) < time(fewest) ? [fewest, every] : [fewest];
}

// The most tokens of a row for which there is a way, to multiples of 64; 0 if there is none.
async function longestRow(model, asked, isLatest) {
  const limit = Math.min(LONGEST, model.positions ?? LONGEST), unit = 64;
  const ways = asked.checkpointing === "auto" ? (asked.savers ? [["selective", ALL], ["free", ALL], ["free", 0]] : [["none", ALL], ["none", 0]]) : [[asked.savers ? "free" : "none", asked.checkpointing === "all" ? ALL : 0]];
  const fits = (length) => ways.some(([savers, layers]) => use(model, { ...asked, length }, savers, layers)?.verdict === "fits");
  if (model.byLength) {
    const known = [...new Set(model.steps.map((step) => step.shape[1]))].sort((a, b) => b - a);
    return known.find(fits) || 0;
  }
  let low = 0, high = Math.floor(limit / unit) + 1;
  for (let step = 16; low + step < high && isLatest(); step *= 2) {
    await pause();
    if (fits((low + step) * unit)) low += step;
    else high = low + step;
  }
  while (high - low > 1 && isLatest()) {
    const middle = (low + high) >> 1;
    await pause();
    if (fits(middle * unit)) low = middle;
    else high = middle;
  }
  return low * unit;
}

function planText(model, asked, way) {
  const parts = [];
  if (way.savers !== "none") parts.push("exact savers");
  if (way.savers === "selective") parts.push("selective checkpointing");
  parts.push(way.layers ? `${way.layers === way.of ? "all" : `${way.layers} of`} ${way.of} layers checkpointed` : "no layers checkpointed");
  const time = timeOf(model, asked, way);
  return `${parts.join(", ")}${time === null ? "" : `; ${time.toFixed(2)}x the step time of plain LoRA without checkpointing`}`;
}

function showAnswer(model, asked, way, counted) {
  const card = cardOf(asked), { id, parameters } = known.about[asked.model], name = asked.card === OTHER ? `card of ${gib(card.memory)}` : asked.card;
  const each = asked.gpus > 1 ? `each of ${asked.gpus} x ${name}` : `one ${name}`;
  const left = way.spare >= 0 ? `${gib(way.spare)} to spare` : `${gib(-way.spare)} over`;
  const bytes = Object.fromEntries(KINDS.map((kind, i) => [kind, way.parts[i]]));
  bytes.context = card.context + bytes.workspace;
  bytes.reserve = way.total - card.context - KINDS.reduce((sum, kind) => sum + (kind === "context" || kind === "reserve" ? 0 : way.parts[KINDS.indexOf(kind)]), 0);
  bytes.spare = Math.max(way.spare, 0);
  const whole = Math.max(way.total, card.memory), shown = PARTS.filter(([kind]) => bytes[kind] > 0);
  const bar = element("div", { class: "bar", role: "img", "aria-label": shown.map(([kind, words]) => `${words} ${gib(bytes[kind])}`).join(", ") });
  for (const [kind, words] of shown) bar.append(element("span", { class: kind, style: `flex: ${bytes[kind] / whole} 0 0`, title: `${words}: ${gib(bytes[kind])}` }));
  if (way.spare < 0) bar.append(element("i", { class: "edge", style: `left: ${(100 * card.memory) / whole}%` }));
  const limit = element("div", { class: "limit" }, element("span", {}, "0"), element("span", { style: way.spare < 0 ? `right: ${100 - (100 * card.memory) / whole}%` : "right: 0" }, gib(card.memory)));
  answer.replaceChildren(
    element("p", { class: "verdict" }, mark(way.verdict), `${gib(way.total)} of ${gib(card.memory)}, ${left}`),
    element("p", {}, `${asked.model} (${(parameters / 1e9).toPrecision(3)}B) ${asked.bits === "nf4" ? "in 4 bits" : "in bf16"} on ${each}, ${count(asked.rows, "row")} of ${count(asked.length, "token")}, rank ${asked.rank} on all linear modules, in ${asked.trainer === "trl" ? "TRL's SFTTrainer" : "transformers' Trainer"}: ${planText(model, { ...asked, length: counted }, way)}.`),
    ...(counted === asked.length ? [] : [element("p", { class: "faint" }, `This model was recorded at a few lengths only; ${asked.length} tokens are counted as ${counted}.`)]),
    ...(asked.bits !== "none" && model.fused ? [element("p", { class: "faint" }, `Its experts, ${gib(2 * model.fused)}, stay in 16 bits, as in transformers. For axolotl and Unsloth, use rankpilot memory --experts.`)] : []),
    ...(way.verdict === "may not fit" ? [element("p", { class: "faint" }, `May not fit: runs of this kind took up to ${percent(slackOf(model, asked))} of the card more than predicted, and less is left.`)] : []),
    ...(way.verdict === "fits" || asked.checkpointing !== "auto" ? [] : [element("p", { class: "faint" }, "It may fit with adapters on the top layers only; the command line shows whether.")]),
    bar, limit,
    element("ul", { class: "parts" }, ...shown.map(([kind, words]) => element("li", {}, element("i", { class: `chip ${kind}` }), words, element("b", {}, gib(bytes[kind]))))),
  );
}

// The peak of tensors at each moment of a run; see `moments_of_run`.
function showMoments(model, asked, way) {
  const { rows, kept } = evaluationOf(model, asked), names = ["the frozen model", "first step", "later steps", `evaluation, batches of ${count(rows, "row")}${kept ? ` (the logits of ${kept} at once)` : ""}`, "saving a checkpoint", "resuming from one", "merging the adapter"];
  const highest = Math.max(...way.moments), decisive = way.moments.indexOf(highest) === 1 && way.moments[2] === highest ? 2 : way.moments.indexOf(highest);
  document.getElementById("moments").replaceChildren(...names.map((name, i) => element("tr", i === decisive ? { class: "chosen" } : {}, element("td", {}, name), element("td", { class: "figure" }, gib(way.moments[i])), element("td", { class: "figure" }, way.main[i] ? gib(way.main[i]) : ""))));
  document.getElementById("evaluation").textContent = names[decisive].startsWith("evaluation") ? "Evaluation decides here. A smaller per_device_eval_batch_size, eval_accumulation_steps or prediction_loss_only lowers it." : "";
}

// Returns whether one of them fits.
function showWays(model, asked, best, streamed = []) {
  const rows = [["plain LoRA, no checkpointing", "none", 0], [`plain LoRA, all layers checkpointed${asked.trainer === "trl" ? " (TRL's default)" : ""}`, "none", ALL], ["exact savers, no checkpointing", "free", 0], ["exact savers, all layers checkpointed", "free", ALL], ["exact and selective, all layers checkpointed", "selective", ALL]];
  const made = rows.map(([words, savers, layers]) => [words, use(model, asked, savers, layers), layers]).filter(([, way, layers]) => way && (way.of || !layers));
  if (!made.some(([, way]) => way === best)) made.push([planText(model, asked, best).split(";")[0], best]);
  made.push(...streamed.map(({ asked: { stream }, way }) => [`streamed base: ${stream} of ${model.base.count} layers, ${way.layers || "none"} checkpointed`, way]));
  document.getElementById("ways").replaceChildren(
    ...made.sort(([, one], [, other]) => other.total - one.total).map(([words, way]) =>
      element("tr", way === best ? { class: "chosen" } : {}, element("td", {}, words), element("td", { class: "figure" }, gib(way.total)), element("td", {}, mark(way.verdict, true)))),
  );
  return made.some(([, way]) => way.verdict === "fits");
}

// What a streamed base brings where no other way fits.
async function showStreamed(model, asked, best, isLatest) {
  if (showWays(model, asked, best)) return;
  const [fewest, every] = await streamedWays(model, asked, isLatest), layers = model.base.count;
  if (!fewest || !isLatest()) return;
  showWays(model, asked, best, every ? [fewest, every] : [fewest]);
  const there = ({ asked }) => gib(asked.stream * layerBytes(model)), time = (each) => timeOf(model, each.asked, each.way), times = time(fewest) === null ? "" : `, ${time(fewest).toFixed(2)}x the step time of plain LoRA without checkpointing`;
  document.getElementById("streamed").replaceChildren(
    element("p", { class: "finding" }, `Streamed base: it fits with at least ${fewest.asked.stream} of ${layers} layers in main memory (${there(fewest)}): ${gib(fewest.way.total)} on the card${times}.`),
    element("p", { class: "faint" }, `Their frozen weights are on the card only while the layer runs.${every ? ` All ${layers} layers (--stream all) take ${there(every)} there and less time, ${time(every).toFixed(2)}x, since fewer need checkpointing.` : ""} Call rankpilot.stream_base(model) before you make the Trainer. The same figures on the command line:`),
    element("pre", {}, element("code", {}, programs(fewest.asked, fewest.way)["command line"][0].join("\n"))),
  );
}

// What each program is told, and a word on it. axolotl and LLaMA-Factory checkpoint all layers or none, and know no savers.
function programs(asked, way) {
  const { id } = known.about[asked.model], four = asked.bits === "nf4", trl = asked.trainer === "trl", again = way.layers > 0;
  const budget = Math.ceil((way.allocated + way.margin - way.parts[0] - cardOf(asked).workspace) / MIB);
  const partly = way.savers === "selective" || (way.layers > 0 && way.layers < way.of), attach = way.savers !== "none" || partly;
  const name = (text) => JSON.stringify(text), optimizer = IN_TRAINERS[asked.optimizer];
  const peft = [
    `from peft import LoraConfig${trl ? "" : `, get_peft_model${four ? ", prepare_model_for_kbit_training" : ""}`}`, ...(trl ? ["from trl import SFTConfig, SFTTrainer"] : []), "import torch",
    `from transformers import AutoModelForCausalLM${four ? ", BitsAndBytesConfig" : ""}${trl ? "" : ", Trainer, TrainingArguments"}`, ...(attach ? ["import rankpilot"] : []), "",
    `lora = LoraConfig(r=${asked.rank}, lora_alpha=${2 * asked.rank}, target_modules="all-linear")`,
    `arguments = ${trl ? "SFTConfig" : "TrainingArguments"}(`, `    per_device_train_batch_size=${asked.rows},`, `    gradient_accumulation_steps=${asked.accumulation},`, ...(trl ? [`    max_length=${asked.length},`] : []), `    gradient_checkpointing=${again && !partly ? "True" : "False"},`, '    gradient_checkpointing_kwargs={"use_reentrant": False},', `    optim=${name(optimizer)},`, "    bf16=True,", ")",
    ...(four
      ? ["bits = BitsAndBytesConfig(", "    load_in_4bit=True,", '    bnb_4bit_quant_type="nf4",', "    bnb_4bit_use_double_quant=True,", "    bnb_4bit_compute_dtype=torch.bfloat16,", ")", "model = AutoModelForCausalLM.from_pretrained(", `    ${name(id)}, quantization_config=bits, dtype=torch.bfloat16`, ")"]
      : [`model = AutoModelForCausalLM.from_pretrained(${name(id)}, dtype=torch.bfloat16)`]),
    ...(trl
      ? ["trainer = SFTTrainer(model, arguments, train_dataset=..., peft_config=lora)"]
      : [...(four ? ["model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)"] : []), `trainer = Trainer(get_peft_model(model, lora), arguments, train_dataset=...)  # rows of up to ${asked.length} tokens`]),
    ...(attach ? [partly ? "# Exact savers, and as few checkpointed layers as needed:" : "# Exact savers: the same losses in less memory:", `rankpilot.attach(trainer, budget="${budget}MiB step")`] : []),
    "trainer.train()",
  ];
  const axolotl = [
    `base_model: ${id}`, `adapter: ${four ? "qlora" : "lora"}`, ...(four ? ["load_in_4bit: true"] : []), `lora_r: ${asked.rank}`, `lora_alpha: ${2 * asked.rank}`, "lora_target_linear: true",
    `sequence_len: ${asked.length}`, `micro_batch_size: ${asked.rows}`, `gradient_accumulation_steps: ${asked.accumulation}`, `gradient_checkpointing: ${again}`, `optimizer: ${optimizer}`, "bf16: true",
  ];
  const factory = [
    `model_name_or_path: ${id}`, "stage: sft", "do_train: true", "finetuning_type: lora", "lora_target: all", `lora_rank: ${asked.rank}`, `lora_alpha: ${2 * asked.rank}`, ...(four ? ["quantization_bit: 4", "quantization_method: bnb"] : []),
    `cutoff_len: ${asked.length}`, `per_device_train_batch_size: ${asked.rows}`, `gradient_accumulation_steps: ${asked.accumulation}`, ...(again ? [] : ["disable_gradient_checkpointing: true"]), `optim: ${optimizer}`, "bf16: true",
  ];
  const more = [
    ...(asked.gpus > 1 ? [`--gpus ${asked.gpus} --sharding ${asked.sharding}`] : []), ...(trl ? ["--loss chunked"] : []), ...(trl && four ? ["--no-prepare-kbit"] : []), ...(asked.savers ? [] : ["--no-exact-savers"]),
    ...(asked.checkpointing === "auto" ? [] : [`--gradient-checkpointing ${asked.checkpointing === "all" ? "True" : "False"}`]), ...(asked.expandable ? ["--expandable-segments"] : []), ...(asked.stream ? [`--stream ${asked.stream}`] : []),
    ...(asked.evalRows ? [`--eval-batch-size ${asked.evalRows}`] : []), ...(asked.keepLogits ? [`--keep-logits ${asked.keepLogits}`] : []),
  ];
  const command = [
    `rankpilot memory ${asked.model} ${option(asked)} --quantization ${asked.bits} --rank ${asked.rank} \\`,
    `    --batch-size ${asked.rows} --max-length ${asked.length} --accumulation ${asked.accumulation} --optimizer ${asked.optimizer}${more.length ? " \\" : ""}`,
    ...(more.length ? [`    ${more.join(" ")}`] : []),
  ];
  const own = (file) => `To predict the memory of these settings: rankpilot memory --config ${file} ${option(asked)}`;
  return { [trl ? "PEFT and TRL" : "PEFT and Trainer"]: [peft, ""], axolotl: [axolotl, own("axolotl.yaml")], "LLaMA-Factory": [factory, own("llama_factory.yaml")], "command line": [command, ""] };
}

let chosen = "PEFT and TRL";
function showLines(asked, way) {
  const all = programs(asked, way), tabs = document.getElementById("tabs"), lines = document.getElementById("lines");
  const choose = (name, focus) => {
    chosen = name;
    for (const tab of tabs.children) {
      const on = tab.textContent === name;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
    }
    const [text, told] = all[name];
    const copy = element("button", { type: "button", class: "copy" }, "Copy");
    copy.onclick = () => navigator.clipboard?.writeText(text.join("\n")).then(() => (copy.textContent = "Copied"));
    const how = told ? [element("p", { class: "faint" }, `${name} checkpoints all layers or none, and has no exact savers. ${told}`)] : [];
    if (!told && way.verdict === "does not fit") how.push(element("p", { class: "faint" }, "These settings take the least memory, but do not fit."));
    lines.replaceChildren(element("pre", {}, element("code", {}, text.join("\n"))), ...how, copy);
    lines.setAttribute("aria-label", name);
  };
  const names = Object.keys(all);
  if (!all[chosen]) chosen = names[0];
  tabs.replaceChildren(...names.map((name) => element("button", { type: "button", role: "tab", "aria-controls": "lines" }, name)));
  tabs.onclick = (event) => event.target.role === "tab" && choose(event.target.textContent);
  tabs.onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) choose(names[(names.indexOf(chosen) + by + names.length) % names.length], true);
  };
  choose(chosen);
}

let latest = 0;
async function show() {
  const asked = readForm(), own = ++latest, isLatest = () => own === latest;
  const { bits, trainer, sharding } = form.elements, ships = (bits, trainer) => document.getElementById(idOf({ ...asked, bits, trainer }));
  for (const option of trainer.options) option.disabled = ![...bits.options].some(({ value }) => ships(value, option.value));
  if (trainer.selectedOptions[0].disabled) trainer.value = asked.trainer = "trainer";
  for (const option of bits.options) option.disabled = !ships(option.value, asked.trainer);
  if (bits.selectedOptions[0].disabled) bits.setCustomValidity(`This page has no recording of ${asked.model} in ${asked.bits}. Choose other weights, or use the command line: rankpilot memory ${asked.model} --quantization ${asked.bits} ${option(asked)}`);
  sharding.disabled = asked.gpus < 2;
  document.getElementById("memory").hidden = asked.card !== OTHER;
  const complain = (text) => {
    answer.replaceChildren(element("p", { class: "verdict" }, text));
    answer.setAttribute("aria-busy", "false");
    for (const id of ["others", "paste"]) document.getElementById(id).hidden = true;
    document.body.dataset.done = own;
  };
  const unfit = form.querySelector(":is(input, select):invalid");
  if (unfit) return complain(`${unfit.labels[0].firstChild.textContent.trim()}: ${unfit.validationMessage}`);
  writeAddress(asked);
  answer.setAttribute("aria-busy", "true");
  const [streamed, longest] = ["streamed", "longest"].map((id) => document.getElementById(id));
  for (const place of [streamed, longest]) place.textContent = "";
  await pause();
  const model = await modelOf(asked).catch(() => null);
  if (!isLatest()) return;
  if (!model) return complain("This browser is too old to unpack the page's data. Use Chrome or Edge 103, Firefox 113, Safari 16.4 or newer.");
  if (model.positions && asked.length > model.positions) return complain(`${asked.model} reads at most ${count(model.positions, "token")}.`);
  const counted = model.byLength ? Math.min(...model.steps.map((step) => step.shape[1]).filter((length) => length >= asked.length)) : asked.length;
  const there = { ...asked, length: counted }, way = Number.isFinite(counted) ? await planned(model, there) : null;
  if (!isLatest()) return;
  if (!way) return complain(`This page covers ${asked.model} up to ${count(Math.max(...model.steps.map((step) => step.shape[1])), "token")} per row. The command line records other batches, with torch: pip install -e ".[train]"`);
  for (const id of ["others", "paste"]) document.getElementById(id).hidden = false;
  showAnswer(model, asked, way, counted);
  answer.setAttribute("aria-busy", "false");
  await pause();
  showLines(asked, way);
  showMoments(model, there, way);
  await showStreamed(model, there, way, isLatest);
  if (!isLatest()) return;
  longest.textContent = "Searching for the longest row that fits ...";
  const most = await longestRow(model, there, isLatest);
  if (!isLatest()) return;
  const cap = Math.min(LONGEST, model.positions ?? LONGEST);
  longest.textContent = most ? `Longest row that fits, ${count(asked.rows, "row")} at a time: ${most + 64 > cap ? `${count(cap, "token")}, ${cap === LONGEST ? "the limit of this page" : "the limit of the model"}` : count(most, "token")}${asked.checkpointing === "auto" ? ", with all layers checkpointed if need be" : ""}.` : `No row fits${streamed.firstChild ? " with the whole base on the card" : ""}, ${count(asked.rows, "row")} at a time.`;
  document.body.dataset.done = own;
}

const [models, cards] = [Object.keys(known.about), Object.entries(known.cards).sort(([, one], [, other]) => one.memory - other.memory)];
form.elements.model.append(...models.map((name) => element("option", {}, name)));
form.elements.card.append(...cards.map(([name, { memory }]) => element("option", { value: name }, name === OTHER ? `${name}, by its memory` : `${name} (${gib(memory)})`)));
form.elements.optimizer.append(...Object.entries(OPTIMIZERS).map(([name, words]) => element("option", { value: name }, words)));
document.getElementById("foot").append(element("p", {}, `The bytes equal those of rankpilot memory: a recorded step of the model is replayed here for your batch, rank, optimizer and card. Adapters are on all linear modules, and attention is torch's flash attention where the model's mask allows it. TRL's SFTTrainer computes the loss in chunks and does not prepare 4-bit models; for transformers' Trainer they are prepared with prepare_model_for_kbit_training. "Fits" leaves room for the largest error of published runs of the same kind: ${percent(known.slack.none)} of the card, ${percent(known.slack.nf4)} in 4 bits, more on several GPUs.`));
let waiting = 0;
form.addEventListener("input", () => {
  for (const field of form.elements) field.setCustomValidity("");
  clearTimeout(waiting);
  waiting = setTimeout(show, 120);
});
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", () => (readAddress(), show()));
readAddress();
show();
