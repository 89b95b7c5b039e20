"""`python -m benchmarks parts`: steps in parts, beside the padded rectangle and beside other ways to avoid its padding.

Rows have the lengths of real texts: questions about functions with their answers, functions of the standard library,
film reviews.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.common.errors import BudgetError
from rankpilot.common.files import read_object, write_json
from rankpilot.common.text import make_table
from rankpilot.cost.batch_shape import padded as with_padding
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.record.live_storages import LivePeak
from rankpilot.cost.record.work import part_seconds_of
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.savers.exact import SAVERS, ExactSavers
from rankpilot.data.corpora import standard_library
from rankpilot.data.models import load_model, load_tokenizer
from rankpilot.data.packaged_data import read_reviews
from rankpilot.decide.plan.parts import Part, PlanBytes, plan_parts
from rankpilot.decide.rules import AsConfigured
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.batch_rows import BatchRows, Cuts
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from rich.console import Console
from torch.utils.data import DataLoader

from .harness import Figures, interleave, padding_share, usual_ratio, with_progress
from .models import LORA, Size, random_model
from .texts import instructions

TEXTS = ("chat", "code", "reviews")

MODELS = {"smollm2-135m-instruct": 192, "all-minilm-l6-v2": 256}
"""The models, and the tokens at which rows are cut."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Steps in parts beside padded ones: time, peak, gradients, and what happens after errors.

    Attributes:
        models: of the packaged ones.
        texts: whose rows have their lengths.
        rows: of a batch, one table for each number.
        rounds: steps of each kind, which take turns.
        batches: random batches under random budgets, on a small model; 0 leaves them out, as the two below.
        steps: of two runs whose losses are compared.
        errors: runs with an error at some part.
        quick: little of each.
        resume: keep the figures that the file of `json` has, and measure the others.
        json: also write figures to this file.
    """

    models: tuple[str, ...] = tuple(MODELS)
    texts: tuple[str, ...] = TEXTS
    rows: tuple[int, ...] = (16, 32)
    rounds: int = 3
    batches: int = 2000
    steps: int = 200
    errors: int = 100
    quick: bool = False
    resume: bool = False
    json: Path | None = None


def benchmark(options: Options, console: Console) -> Figures:
    """All tables; their figures by model, text, rows and kind of step."""
    torch.set_num_threads(1)
    path = options.json if options.resume else None
    figures: Figures = dict(read_object(path)) if path and path.exists() else {}
    for key, work in _pieces(options, console).items():
        if key not in figures:
            figures |= work()
            if options.json:
                write_json(options.json, figures)
    return figures


def _pieces(options: Options, console: Console) -> dict[str, Callable[[], Figures]]:
    """The tables by one of their figures."""
    few, found = options.quick, dict[str, Callable[[], Figures]]()
    for model in options.models[-1:] if few else options.models:
        for rows in options.rows[:1] if few else options.rows:
            for text in options.texts[:1] if few else options.texts:
                rounds = 2 if few else options.rounds
                found[f"{model}.{text}.{rows}.time"] = partial(_steps, model, text, rows, rounds, console)
    if options.batches:
        found["budgets.batches"] = partial(_under_budgets, 50 if few else options.batches, console)
    if options.steps:
        found["losses.steps"] = partial(_losses, 10 if few else options.steps, console)
    if options.errors:
        found["errors.runs"] = partial(_errors, 3 if few else options.errors, console)
    return found


# Rows -----------------------------------------------------------------------------------------------------------------


@cache
def rows_of_text(text: str, model: str, count: int) -> list[IntArray]:
    """Token ids of so many texts, each at least 4 tokens and cut where the model's rows are, in one fixed order."""
    tokenizer = load_tokenizer(model)
    texts = list(islice(_texts(text), 6 * count))
    order = np.random.default_rng(0).permutation(len(texts))
    found = (np.array(tokenizer(texts[place])["input_ids"][: MODELS[model]]) for place in order)
    return list(islice((ids for ids in found if len(ids) >= 4), count))


def _texts(name: str) -> Iterator[str]:
    if name == "chat":
        yield from instructions()
    elif name == "reviews":
        yield from (row["text"] for row in read_reviews("rotten_tomatoes"))
    else:
        for path in standard_library():
            source = path.read_text(encoding="utf-8", errors="ignore")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    yield ast.get_source_segment(source, node) or ""


def padded(rows: Sequence[IntArray]) -> dict[str, torch.Tensor]:
    """A batch of rows, padded to the longest."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.as_tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(rows: Sequence[IntArray], length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one row each that hold whole texts side by side, by best fit, as TRL packs them."""
    bins: list[list[IntArray]] = []
    for row in sorted(rows, key=len, reverse=True):
        room = [length - sum(map(len, texts)) - len(row) for texts in bins]
        fitting = [place for place, left in enumerate(room) if left >= 0]
        if fitting:
            bins[min(fitting, key=room.__getitem__)].append(row)
        else:
            bins.append([row])
    batches = []
    for texts in bins:
        ids = torch.as_tensor(np.concatenate(texts))[None]
        places = torch.as_tensor(np.concatenate([np.arange(len(text)) for text in texts]))[None]
        labels = torch.where(places > 0, ids, -100)
        batches.append({"input_ids": ids, "position_ids": places, "labels": labels})
    return batches


# Steps ----------------------------------------------------------------------------------------------------------------


class Stepper:
    """Takes training steps of one model on rows, in several ways.

    Args:
        model: a packaged model; MiniLM classifies its rows, SmolLM2 continues them.
        most: the largest shape of a batch.
    """

    def __init__(self, name: str, most: BatchShape) -> None:
        torch.manual_seed(0)
        self.classifies = name == "all-minilm-l6-v2"
        task, labels = ("classification", ("no", "yes")) if self.classifies else ("causal-lm", ())
        base = load_model(name, task, labels, load_tokenizer(name)).float()  # type: ignore[arg-type]
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        base.config.attention_probs_dropout_prob = 0.0
        targets = ["query", "key", "value", "dense"] if self.classifies else "all-linear"
        kept = ["classifier"] if self.classifies else None
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=kept)
        self._prepare(get_peft_model(base, config), most)

    @classmethod
    def small(cls, most: BatchShape) -> Stepper:
        """A Llama of four narrow layers with random weights."""
        self = cls.__new__(cls)
        self.classifies = False
        size = Size(layers=4, width=64, vocabulary=1000, rows=most.rows, length=most.length)
        self._prepare(get_peft_model(random_model("llama", size, 0), LoraConfig(**LORA["llama"])), most)
        return self

    def _prepare(self, model: Any, most: BatchShape) -> None:
        self.model = model.train()
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        ExactSavers(model, tuple(SAVERS))
        self.trains = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trains, lr=1e-4, fused=True)
        self.layers = LayerCheckpointing(model)
        ranks = np.full(len(found := find_target_modules(model)), 8)
        batch = self.labelled(with_padding(padded([np.arange(1, most.length + 1) % 900] * most.rows)))
        memory = calibrate(model, found, batch, self.optimizer, loss=partial(self.loss, None), signal_bytes=False)
        memory = replace(memory, accumulates=True)
        self.bytes = PlanBytes(memory, ranks, most, chooses=True, each=1)
        self.seconds = part_seconds_of(model, int(memory.recording.created.max()), len(self.bytes.layers))
        self.optimizer_step()

    def labelled(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, with a class of each row where rows are classified."""
        if not self.classifies:
            return batch
        return batch | {"labels": batch["input_ids"][:, 1] % 2}

    def loss(self, items: float | None, batch: dict[str, torch.Tensor], *, bf16: bool = False) -> torch.Tensor:
        """The loss of a batch, divided by so many predictions or rows; by default by its own."""
        options = {} if items is None or self.classifies else {"num_items_in_batch": torch.tensor(items)}
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss: torch.Tensor = self.model(**batch, **options).loss
        return loss * (len(batch["input_ids"]) / items) if self.classifies and items else loss

    def items(self, rows: Sequence[IntArray]) -> int:
        """What the loss of a step is divided by."""
        return len(rows) if self.classifies else sum(len(row) - 1 for row in rows)

    def run(
        self, batches: Sequence[Any], items: float | Sequence[float], layers: Sequence[int], *, bf16: bool = False
    ) -> float:
        """Forward and backward passes of the batches of a step.

        Args:
            batches: of the step.
            items: what the loss of each is divided by.
            layers: how many are checkpointed in each.
            bf16: under autocast.
        """
        total = 0.0
        each = [items] * len(batches) if isinstance(items, float | int) else items
        for batch, count, number in zip(batches, layers, each, strict=True):
            self.layers.take(self.bytes.layers[:count])
            self.layers.before_step()
            loss = self.loss(number, batch, bf16=bf16)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def in_parts(
        self, rows: Sequence[IntArray], room: float = np.inf
    ) -> tuple[list[dict[str, torch.Tensor]], list[int], tuple[Part, ...]]:
        """The parts of a step within some bytes, their layers, and the plan."""
        batch = self.labelled(padded(rows))
        found = BatchRows.of(batch, Cuts.seen_in([batch], left=False))
        lengths = np.array([len(row) for row in rows])

        def needed(examples: IntArray, tokens: IntArray, layers: int) -> FloatArray:
            return self.bytes(examples, tokens, layers) + 24 * examples * tokens

        plan = plan_parts(lengths, room, self.bytes.levels, needed, self.seconds)
        return [found.part(part.rows) for part in plan], [part.layers for part in plan], plan

    def gradient(
        self, batches: Sequence[Any], items: float | Sequence[float], layers: Sequence[int], **options: bool
    ) -> torch.Tensor:
        """The gradient of a step, as one vector; afterwards there is none."""
        self.run(batches, items, layers, **options)
        found = torch.cat([p.grad.flatten() for p in self.trains])
        self.optimizer.zero_grad()
        return found

    def peak(self, batches: Sequence[Any], items: float | Sequence[float], layers: Sequence[int]) -> int:
        """Bytes at the peak of a step, with weights and the optimizer's state."""
        with LivePeak() as live:
            self.run(batches, items, layers)
            self.optimizer_step()
        return int(live.peak) + sum(3 * int(p.nbytes) for p in self.trains)

    def optimizer_step(self) -> None:
        """A step of the optimizer, after which there are no gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Step:
    """A step in the way of some tool.

    Attributes:
        batches: that run one after the other.
        items: what the loss of each is divided by.
        layers: how many are checkpointed in each.
    """

    batches: Sequence[Any]
    items: Sequence[float]
    layers: Sequence[int]

    @property
    def arguments(self) -> tuple[Sequence[Any], Sequence[float], Sequence[int]]:
        """As `Stepper.run` takes them."""
        return self.batches, self.items, self.layers

    @property
    def tokens(self) -> int:
        """Of its largest batch, padding included."""
        return max(int(batch["input_ids"].numel()) for batch in self.batches)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _steps(name: str, text: str, rows: int, rounds: int, console: Console) -> Figures:
    """Steps of one batch: the rectangle, and the same in parts; then four batches in the ways of others."""
    stepper = Stepper(name, BatchShape(rows, MODELS[name]))
    texts = rows_of_text(text, name, 4 * rows)
    groups = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    batch, items = groups[0], stepper.items(groups[0])
    lengths, every = np.array([len(row) for row in batch]), stepper.bytes.levels[-1]
    whole = [stepper.labelled(padded(batch))]
    parts, layers, plan = stepper.in_parts(batch)
    rectangle = Part(tuple(range(rows)), int(lengths.max()), every)
    room = stepper.bytes.exact(rectangle, first=True)  # alone in its step, it has no gradients beside it
    least, least_layers, least_plan = stepper.in_parts(batch, room)
    kinds: dict[str, tuple[list[Any], list[int]]] = {
        "rectangle": (whole, [0]),
        "parts": (parts, layers),
        "rectangle, all checkpointed": (whole, [every]),
        "parts in its bytes": (least, least_layers),
    }

    def step(batches: list[Any], counts: list[int], turn: int) -> None:
        stepper.run(batches, items, counts)
        stepper.optimizer_step()

    work = {kind: partial(step, *of_kind) for kind, of_kind in kinds.items()}
    seconds = interleave(work, rounds, torch.device("cpu"), clock=time.process_time)
    peaks = {kind: stepper.peak(batches, items, counts) for kind, (batches, counts) in kinds.items()}
    fp32, bf16 = (
        [stepper.gradient(kinds[kind][0], items, kinds[kind][1], bf16=half) for kind in ("rectangle", "parts")]
        for half in (False, True)
    )
    key = f"{name}.{text}.{rows}"
    figures: Figures = {
        f"{key}.time": usual_ratio(seconds["parts"], seconds["rectangle"]).value,
        f"{key}.time checkpointed": usual_ratio(
            seconds["parts in its bytes"], seconds["rectangle, all checkpointed"]
        ).value,
        f"{key}.peak": peaks["parts"] / peaks["rectangle"],
        f"{key}.peak checkpointed": peaks["parts in its bytes"] / peaks["rectangle, all checkpointed"],
        f"{key}.gradient": _difference(fp32[1], fp32[0]),
        f"{key}.gradient bf16": _difference(bf16[1], bf16[0]),
        f"{key}.parts": len(plan),
        f"{key}.parts checkpointed": len(least_plan),
        f"{key}.padding saved": padding_share(lengths, plan),
        f"{key}.mean length": float(lengths.mean()),
        f"{key}.longest": int(lengths.max()),
    }
    table = make_table(
        f"{name}, {rows} rows of {text}, mean {lengths.mean():.0f} and at most {lengths.max()} tokens",
        ("step", "parts", "CPU time", "peak, MiB", "gradient differs, fp32", "bf16 autocast"),
    )
    for kind, (batches, _) in kinds.items():
        base = "rectangle, all checkpointed" if "bytes" in kind else "rectangle"
        ratio = usual_ratio(seconds[kind], seconds[base]).value
        same = [f"{figures[f'{key}.gradient{of}']:.1e}" for of in ("", " bf16")] if kind == "parts" else ["", ""]
        table.add_row(kind, str(len(batches)), f"{ratio:.3f} of {base}", f"{peaks[kind] / 2**20:.1f}", *same)
    console.print(table)
    compared = stepper.classifies or (text, rows) == ("code", 16)
    return figures | (_rivals(stepper, key, texts, rows, rounds, console) if compared else {})


def _rivals(stepper: Stepper, key: str, texts: list[IntArray], rows: int, rounds: int, console: Console) -> Figures:
    """Four batches in the ways of others: rows a second and the highest peak, over those of rectangles.

    The gradient is that of the first step, and its difference from that of the first rectangle over its size.
    """
    ways = _ways(stepper, texts, rows)

    def pass_of(steps: Sequence[Step], turn: int) -> None:
        for step in steps:
            stepper.run(*step.arguments)
            stepper.optimizer_step()

    expected = stepper.gradient(*ways["rectangle"][0].arguments)
    changed = {way: _difference(stepper.gradient(*steps[0].arguments), expected) for way, steps in ways.items()}
    peaks = {way: stepper.peak(*max(steps, key=lambda step: step.tokens).arguments) for way, steps in ways.items()}
    work = {way: partial(pass_of, steps) for way, steps in ways.items()}
    seconds = interleave(work, rounds, torch.device("cpu"), clock=time.process_time)
    table = make_table(
        f"Four batches of {rows} rows, over padded rectangles", ("way", "rows a second", "peak", "gradient differs")
    )
    figures: Figures = {}
    for way in ways:
        speed, peak = usual_ratio(seconds["rectangle"], seconds[way]).value, peaks[way] / peaks["rectangle"]
        table.add_row(way, f"{speed:.2f}", f"{peak:.2f}", f"{changed[way]:.1e}")
        figures |= {f"{key}.{way}.speed": speed, f"{key}.{way}.peak": peak, f"{key}.{way}.gradient": changed[way]}
    console.print(table)
    return figures


def _ways(stepper: Stepper, texts: list[IntArray], rows: int) -> dict[str, list[Step]]:
    """The steps of each way over the same texts.

    Composer and accelerate halve a batch until it fits, here until it has half of the bytes of the rectangle. Composer
    runs what is halved one after the other, and counts their means by rows. Accelerate begins the run again, so steps
    have fewer rows. Texts in one row without padding see each other's tokens as little as in TRL, by a mask: a
    processor has no kernel for that.
    """
    groups = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    longest = max(map(len, texts))
    budget = 0.5 * float(stepper.bytes(np.array([rows]), np.array([longest]), 0)[0])
    by_length = np.array_split(np.argsort([-len(text) for text in texts], kind="stable"), len(groups))
    micro = rows
    while micro > 1 and float(stepper.bytes(np.array([micro]), np.array([longest]), 0)[0]) > budget:
        micro //= 2

    def rectangle(group: Sequence[IntArray]) -> Step:
        return Step([stepper.labelled(padded(group))], [stepper.items(group)], [0])

    def halved(group: Sequence[IntArray]) -> Step:
        pieces = [group[at : at + micro] for at in range(0, len(group), micro)]
        items = [stepper.items(piece) * len(group) / len(piece) for piece in pieces]
        return Step([stepper.labelled(padded(piece)) for piece in pieces], items, [0] * len(pieces))

    def parts(group: Sequence[IntArray], room: float = np.inf) -> Step:
        batches, layers, _ = stepper.in_parts(group, room)
        return Step(batches, [stepper.items(group)] * len(batches), layers)

    ways = {
        "rectangle": [rectangle(group) for group in groups],
        "group_by_length": [rectangle([texts[place] for place in group]) for group in by_length],
        "Composer, halved": [halved(group) for group in groups],
        "find_executable_batch_size": [rectangle(texts[at : at + micro]) for at in range(0, len(texts), micro)],
        "parts": [parts(group) for group in groups],
        "parts in half the bytes": [parts(group, budget) for group in groups],
    }
    if not stepper.classifies:
        blocks = packed(texts, longest)
        each = -(-len(blocks) // len(groups))
        steps = [blocks[at : at + each] for at in range(0, len(blocks), each)]
        counts = [float(sum(int((batch["labels"] >= 0).sum()) for batch in step)) for step in steps]
        ways["TRL, packing"] = [
            Step(step, [count] * len(step), [0] * len(step)) for step, count in zip(steps, counts, strict=True)
        ]
        ways["TRL, padding-free"] = [
            Step(packed(group, sum(map(len, group))), [stepper.items(group)], [0]) for group in groups
        ]
    return ways


# What holds of any batch ----------------------------------------------------------------------------------------------


def _under_budgets(count: int, console: Console) -> Figures:
    """Random batches under budgets of 30 to 100 % of their rectangle: is any peak above, and is each predicted?"""
    generator, most = np.random.default_rng(0), BatchShape(32, 256)
    stepper = Stepper.small(most)
    above = refused = 0
    errors = np.zeros(count)
    for index in with_progress(range(count), "random batches"):
        lengths = np.clip(np.exp(generator.normal(3.5, 0.9, generator.integers(2, 33))), 4, 256).astype(int)
        rows = [generator.integers(1, 1000, length) for length in lengths]
        whole = float(stepper.bytes(np.array([len(rows)]), np.array([lengths.max()]), 0)[0])
        room = generator.uniform(0.3, 1.0) * whole
        try:
            batches, layers, plan = stepper.in_parts(rows, room)
        except BudgetError:  # a row alone takes more
            refused += 1
            continue
        measured = stepper.peak(batches, stepper.items(rows), layers)
        given = [24 * len(part.rows) * part.length for part in plan]
        predicted = max(
            stepper.bytes.exact(part, first=number == 0) + extra
            for number, (part, extra) in enumerate(zip(plan, given, strict=True))
        )
        errors[index] = measured / predicted - 1
        above += measured > room
    table = make_table(f"{count} random batches under budgets of 30 to 100 %", ("", ""))
    table.add_row("a row alone takes more", str(refused))
    table.add_row("peaks above the budget", str(above))
    table.add_row("measured over predicted, least and most", f"{errors.min():+.4f} to {errors.max():+.4f}")
    table.add_row("median difference", f"{np.median(np.abs(errors)):.5f}")
    console.print(table)
    return {
        "budgets.batches": count,
        "budgets.refused": refused,
        "budgets.above": above,
        "budgets.least": float(errors.min()),
        "budgets.most": float(errors.max()),
        "budgets.median": float(np.median(errors)),
    }


def _losses(steps: int, console: Console) -> Figures:
    """Two runs of MiniLM, as rectangles and in parts: the losses of all steps."""
    rows, losses = 16, dict[str, list[float]]()
    texts = rows_of_text("chat", "all-minilm-l6-v2", rows * min(steps, 50))
    for way in ("rectangle", "parts"):
        stepper = Stepper("all-minilm-l6-v2", BatchShape(rows, 256))
        losses[way] = []
        for step in with_progress(range(steps), f"losses, {way}"):
            start = step * rows % len(texts)
            batch = texts[start : start + rows]
            whole = [stepper.labelled(padded(batch))], [0]
            losses[way].append(stepper.run(*_with(whole if way == "rectangle" else stepper.in_parts(batch)[:2], rows)))
            stepper.optimizer_step()
    difference = float(np.abs(np.subtract(losses["parts"], losses["rectangle"])).max())
    console.print(f"{steps} steps of MiniLM: losses in parts differ by {difference:.1e} at most.")
    return {"losses.steps": steps, "losses.difference": difference}


def _with(step: Any, items: int) -> tuple[Any, int, Any]:
    batches, layers = step
    return batches, items, layers


def _errors(count: int, console: Console) -> Figures:
    """Runs in which a part runs out of memory, beside the same runs undisturbed; some rows are 16 times the median."""
    lost, differences = 0, []
    for seed in with_progress(range(count), "errors"):
        undisturbed, _ = _short_run(seed, None)
        found, failed = _short_run(seed, int(np.random.default_rng(seed).integers(1, 7)))
        lost += not failed
        differences.append(_difference(found, undisturbed))
    console.print(
        f"{count} runs with an error at some part: {count - lost} had one, none was lost; adapters differ from the "
        f"undisturbed run's by {max(differences):.1e} at most."
    )
    return {"errors.runs": count, "errors.met": count - lost, "errors.difference": max(differences)}


def _of_ids(rows: list[dict[str, IntArray]]) -> dict[str, torch.Tensor]:
    return padded([row["input_ids"] for row in rows])


def _short_run(seed: int, fails_at: int | None) -> tuple[torch.Tensor, bool]:
    """The adapters after a run of six steps in which the part of this number fails once, and whether one did."""
    generator = np.random.default_rng(seed)
    lengths = np.where(generator.random(48) < 0.06, 256, generator.integers(8, 25, 48))
    data = [{"input_ids": generator.integers(1, 1000, length)} for length in lengths]
    torch.manual_seed(seed)
    size = Size(layers=2, width=32, vocabulary=1000, rows=8, length=256)
    model = get_peft_model(random_model("llama", size, 0), LoraConfig(**LORA["llama"])).train()
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-3)
    loader: DataLoader[Any] = DataLoader(data, batch_size=8, collate_fn=_of_ids)  # type: ignore[arg-type]
    pilot = RankPilot(AsConfigured(), "40%", tell=lambda line: None, keep_rate=True)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=6, in_parts=True))
    number, failed = 0, False
    for batch in loader:
        pilot.before_step(batch)
        while True:
            try:
                total = 0.0
                for part, share in pilot.parts(batch):
                    number += 1
                    if number == fails_at:
                        failed = True
                        raise torch.OutOfMemoryError("an error of the benchmark")
                    loss = share * model(**part).loss
                    loss.backward()
                    total += float(loss.detach())
                break
            except torch.OutOfMemoryError as error:
                pilot.out_of_memory(error)
        pilot.before_optimizer_step(total)
        optimizer.step()
        optimizer.zero_grad()
        pilot.after_step()
    pilot.finish()
    return torch.cat([p.detach().flatten() for p in trains]), failed
