"""What rankpilot promises about memory: predictions beside measurements."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig
from rankpilot.common.arrays import IntArray
from rankpilot.common.devices import find_device
from rankpilot.common.errors import ConfigError
from rankpilot.common.text import make_table
from rankpilot.cost.batch_shape import Batch
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.recording import BatchShape
from rich.console import Console

from .harness import Figures, interleave, machine_facts, with_progress
from .models import ARCHITECTURES, LORA, Family, Learner, Size, random_model

Checkpointing = Literal["none", "not reentrant", "reentrant"]
Precision = Literal["fp32", "bf16", "autocast"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "not reentrant", "reentrant")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "autocast")

SMALL = Size(layers=4, width=64, vocabulary=256, length=128)
CLASSES = 3
FIELDS: dict[Family, dict[str, Any]] = {"llama": {"num_key_value_heads": 2}, "bert": {"num_labels": CLASSES}}
"""Further fields of models' configs: Llama shares keys and values between heads."""


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        family: of the model; BERT and its adapters have dropout.
        checkpointing: of gradients, in which of torch's two forms.
        precision: fp32 weights, bf16 weights under fp32 adapters, or fp32 weights under bf16 autocast.
    """

    family: Family
    checkpointing: Checkpointing
    precision: Precision

    def learner(self, device: torch.device, seed: int) -> Learner:
        """A fresh model with adapters, the same one for the same arguments."""
        base = random_model(self.family, SMALL, seed, heads=4, **FIELDS.get(self.family, {}))
        base = base.to(device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        config = LoraConfig(**LORA[self.family], lora_dropout=0.05 if self.family == "bert" else 0.0)
        learner = Learner(base, config, seed=seed, autocast=self.precision == "autocast")
        if self.checkpointing != "none":
            reentrant = self.checkpointing == "reentrant"
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                base.enable_input_require_grads()
        return learner

    def batch(self, shape: BatchShape, device: torch.device, seed: int) -> Batch:
        """Random tokens and labels."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, SMALL.vocabulary, (shape.rows, shape.length), generator=generator).to(device)
        if self.family != "bert":
            return {"input_ids": tokens, "labels": tokens}
        classes = torch.arange(shape.rows, device=device) % CLASSES
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": classes}


CALIBRATED = BatchShape(8, 32)
SHAPES = (CALIBRATED, BatchShape(3, 32), BatchShape(12, 44))
"""Batches of the plans; all but the first are predicted from a calibration on another one."""
RANKS = (1, 2, 4, 8, 16)
DENSITIES = (1.0, 0.6, 0.3, 0.1)


@dataclass(frozen=True)
class Errors:
    """Predicted over measured bytes, minus 1, of several plans: above 0 where the prediction is too high.

    Attributes:
        median: of the absolute value.
        high: 95th percentile of the absolute value.
        over: the worst prediction above what was measured; below 0 if there is none.
        under: the worst one below it; above 0 if there is none.
    """

    median: float
    high: float
    over: float
    under: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Errors | None:
        """Errors of (predicted, measured) pairs; None if there are none."""
        table = np.array(list(pairs), dtype=np.float64)
        if not len(table):
            return None
        errors = table[:, 0] / table[:, 1] - 1
        size = np.abs(errors)
        return cls(float(np.median(size)), float(np.quantile(size, 0.95)), float(errors.max()), float(errors.min()))


def random_plan(generator: np.random.Generator, blocks: IntArray, turn: int) -> IntArray:
    """Random ranks on some modules, rank 0 on the others: everywhere, on top layers only, or on a single module.

    Args:
        generator: of all draws.
        blocks: layer of each module, (modules,).
        turn: number of the plan; the kinds take turns.
    """
    ranks = generator.choice(RANKS, size=len(blocks)) * (generator.random(len(blocks)) < DENSITIES[turn % 4])
    if turn % 3 == 2:
        ranks[blocks < generator.integers(1, blocks.max() + 1)] = 0
    if not ranks.any():
        ranks[generator.integers(len(blocks))] = generator.choice(RANKS)
    return np.asarray(ranks, dtype=np.int64)


def compare_plans(
    setting: Setting, shapes: Sequence[BatchShape], plans: int, device: torch.device, seed: int
) -> dict[str, Any]:
    """Predict and measure random plans in one setting.

    Args:
        setting: how the model trains.
        shapes: of batches; the model is calibrated on `CALIBRATED` alone.
        plans: at each shape.
        device: where.
        seed: of everything.

    Returns:
        "calibration_steps" (seconds of calibration over the median of three plain steps) and "plans". Each of these has
        "calibrated" (whether the batch has the shape of calibration), "saved" (predicted and measured bytes that
        autograd holds for the backward pass; None with checkpointing) and "peak" (the same at the peak of the step).
    """
    learner = setting.learner(device, seed)
    generator = np.random.default_rng([seed, *map(ord, repr(setting))])
    blocks = np.array([target.block for target in learner.targets], dtype=np.int64)
    batch = setting.batch(CALIBRATED, device, seed)
    # The first step warms up.
    step_s = np.median(interleave({"step": lambda turn: learner.step(batch)}, 4, device)["step"][1:])
    start = time.perf_counter()
    memory = learner.calibrate(batch)
    calibration_s = time.perf_counter() - start
    compared = []
    for shape in shapes:
        batch, cost = setting.batch(shape, device, seed), memory.cost(shape)
        for turn in range(plans):
            ranks = learner.set_ranks(random_plan(generator, blocks, turn))
            learner.step(batch)  # the optimiser's state is there from now on
            peak = plan_cost(cost, ranks), float(learner.measured_step(batch))
            saved = None
            if setting.checkpointing == "none":
                saved = memory.saved(ranks, shape), float(saved_bytes(learner, batch))
            compared.append({"calibrated": shape == CALIBRATED, "saved": saved, "peak": peak})
    return {"calibration_steps": calibration_s / float(step_s), "plans": compared}


class _Token:
    """Stands for a tensor that autograd saved; dies with the graph."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(learner: Learner, batch: Batch) -> int:
    """Bytes of distinct storages that autograd holds at the end of a forward pass: weights and batch apart."""
    model = learner.model
    known = (*model.parameters(), *model.buffers(), *batch.values())
    excluded = {tensor.untyped_storage().data_ptr() for tensor in known}
    tokens: list[weakref.ref[_Token]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Token:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in excluded:
            return tensor
        token = _Token(tensor)
        tokens.append(weakref.ref(token))
        return token

    def unpack(saved: torch.Tensor | _Token) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Token) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), learner.precision():
        loss = model(**batch).loss
    alive = [token.tensor.untyped_storage() for reference in tokens if (token := reference())]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())
    del loss
    return total


KINDS = {"saved": "Saved for backward", "peak": "Peak of a step"}
BARS = {"saved": "Bars: 0.5, 2, 4, -4", "peak": "Bars: 0.5, 3, 4, -4"}
"""The largest errors that are allowed: median and 95th percentile of their size, the worst over and under, in %."""

GROUPS: tuple[Callable[[Setting, Mapping[str, Any]], str], ...] = (
    lambda setting, plan: f"{setting.family}, {setting.checkpointing}",
    lambda setting, plan: f"all, {setting.precision}",
    lambda setting, plan: "calibrated shape" if plan["calibrated"] else "other shapes",
    lambda setting, plan: "no checkpointing" if setting.checkpointing == "none" else "checkpointing",
)
"""Titles of the lines that a plan counts in."""


def accuracy(results: Mapping[Setting, Mapping[str, Any]], console: Console) -> Figures:
    """Print the errors of random plans by setting, shape and precision; returns the figures."""
    groups: dict[str, list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
    for title_of in GROUPS:
        for setting, result in results.items():
            for plan in result["plans"]:
                groups[title_of(setting, plan)].append((plan, result["calibration_steps"]))
    figures: Figures = {"accuracy.plans": sum(len(result["plans"]) for result in results.values())}
    for kind, what in KINDS.items():
        rows = []
        for title, plans in groups.items():
            pairs = [plan[kind] for plan, _ in plans if plan[kind]]
            errors = Errors.of(pairs)
            if errors is None:
                continue
            steps = float(np.median([steps for _, steps in plans]))
            sizes = (f"{100 * size:.3f}" for size in (errors.median, errors.high))
            worst = (f"{100 * error:+.3f}" for error in (errors.over, errors.under))
            rows.append((title, str(len(pairs)), *sizes, *worst, f"{steps:.1f}"))
            prefix = f"accuracy.{title.replace(', ', '.').replace(' ', '_')}"
            figures[f"{prefix}.calibration_steps"] = steps
            figures |= {f"{prefix}.{kind}_error_{name}": value for name, value in vars(errors).items()}
        columns = ("model, checkpointing", "plans", "median", "95th", "over", "under", "calibr.")
        console.print(make_table(f"{what}, predicted over measured - 1, in %. {BARS[kind]}", columns, rows))
    console.print("calibr.: time of the calibration, in training steps", highlight=False)
    return figures


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        settings: of random plans.
        shapes: batch shapes of each setting.
        plans: random plans at each shape.
    """

    settings: tuple[Setting, ...]
    shapes: tuple[BatchShape, ...]
    plans: int


FULL = Extent(
    settings=tuple(Setting(f, c, p) for f in ARCHITECTURES for c in CHECKPOINTING for p in PRECISIONS),
    shapes=SHAPES,
    plans=3,
)
QUICK = Extent(
    settings=tuple(
        Setting(family, checkpointing, "fp32")
        for index, family in enumerate(ARCHITECTURES)
        for checkpointing in ("none", CHECKPOINTING[1 + index % 2])
    ),
    shapes=SHAPES[:2],
    plans=1,
)


@dataclass(frozen=True)
class Options:
    """Show that the memory of a training step is predicted.

    Random plans (random ranks, rank 0 included; all layers, top layers, single modules) are trained for two steps on
    small random Llama, BERT, GPT-2 and T5 models, with gradient checkpointing in each of torch's forms and in three
    precisions, at the batch shape of calibration and at others. "Saved" is what autograd holds at the end of the
    forward pass, "peak" all of a step, both beside the frozen model. An error is predicted over measured, minus 1:
    above 0 is safe, below 0 is not. Under checkpointing the prediction holds a margin.

    The full run takes about four minutes on two cores. Leave the machine alone meanwhile; OMP_NUM_THREADS=1 makes
    figures steadier.

    Attributes:
        quick: under a minute: a thin slice of everything, whose times mean nothing.
        json: also write the figures to this file, as flat JSON with names like
            "accuracy.no_checkpointing.peak_error_median".
        device: auto is CUDA where there is one.
        seed: of models, batches and plans, at least 0.
    """

    quick: bool = False
    json: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def benchmark(options: Options, console: Console) -> Figures:
    """Measure, print the tables, and return all figures.

    Raises:
        ConfigError: a value out of range, or an absent device.
    """
    if options.seed < 0:
        raise ConfigError(f"--seed is at least 0; got {options.seed}.")
    extent, device = QUICK if options.quick else FULL, find_device(options.device)
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    plans = {
        setting: compare_plans(setting, extent.shapes, extent.plans, device, options.seed)
        for setting in with_progress(extent.settings, "settings of random plans")
    }
    return figures | accuracy(plans, console)
