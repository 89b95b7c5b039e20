"""The time of a step that is predicted from its counted work, beside the time that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.common.errors import ConfigError
from rankpilot.common.text import make_table
from rankpilot.cost.record.work import count_work, measured_rates
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.step_time import StepTime
from rankpilot.cost.training_step import TrainingStep, model_loss
from rankpilot.data.models import load_model
from rankpilot.lora.spec import REFERENCE_RANK, RankLadder, highest_ranks
from rich.console import Console
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from .harness import (
    Figures,
    clock_for,
    interleave,
    isolated,
    machine_facts,
    with_progress,
)
from .models import LORA, Family, Learner, Size, random_loader, random_model

TimedPlan = tuple[IntArray, tuple[str, ...]]
"""Ranks (modules,), and the names of the checkpointed layers."""

LLAMA, MINILM = "llama-30x256", "all-minilm-l6-v2"


@dataclass(frozen=True)
class Options:
    """Predict the time of a training step under random plans, and measure it.

    Plans differ in ranks, in depth, in the modules that have an adapter, and in the layers that run again. Counted work
    and measured rates predict them, as for goal="time". Models: a random Llama of 30 layers x 256, and MiniLM
    (packaged). CPU time of one thread on a CPU. Takes about a quarter of an hour.

    Attributes:
        plans: of each model, at least 3.
        rounds: how often each step is timed, at least 1; the median counts.
        quick: under a minute: one small Llama, 12 plans.
        json: also write the figures to this file, as flat JSON with names like "llama-30x256.median_error".
    """

    plans: int = 60
    rounds: int = 3
    quick: bool = False
    json: Path | None = None


class TimedModel:
    """A model whose step can be timed under any plan, and the prediction of its time."""

    def __init__(self, family: Family, size: Size, base: PreTrainedModel, seed: int, *, checkpoint: bool) -> None:
        base.config.use_cache = False
        self.learner = Learner(base, LoraConfig(**LORA[family]))
        batch = next(iter(random_loader(family, size, seed, batches=1)))
        self.batch = {name: values.to(base.device) for name, values in batch.items()}
        self.targets = self.learner.targets
        self.checkpointing = LayerCheckpointing(self.learner.model) if checkpoint else None
        self.layers = self.checkpointing.layers if self.checkpointing else ()
        self.step = TrainingStep(self.learner.model, model_loss(self.learner.model), self.learner.optimizer)
        rates = measured_rates(base.device, base.dtype)
        self.time: StepTime = count_work(self.learner.model, self.targets, self.step.loss, self.batch).time(rates)
        self.most = highest_ranks(self.targets)

    def seconds(self, plans: Sequence[TimedPlan], rounds: int) -> dict[str, FloatArray]:
        """Seconds of each plan in each round, by its number; plans take turns."""

        def work(plan: TimedPlan) -> Callable[[int], None]:
            return lambda turn: self.learner.step(self.batch)

        device = self.batch["input_ids"].device
        clock, found = clock_for(device), {str(number): np.zeros(rounds) for number in range(len(plans))}
        for turn in range(rounds):
            for number, plan in enumerate(plans):
                self.set(plan)
                # The first step after a change of ranks makes states of the optimiser.
                seconds = interleave({"step": work(plan)}, 2, device, clock=clock)
                found[str(number)][turn] = seconds["step"][-1]
        return found

    def set(self, plan: TimedPlan) -> None:
        """Give the modules the plan's ranks, and let its layers run again."""
        ranks, layers = plan
        self.learner.set_ranks(ranks)
        if self.checkpointing:
            self.checkpointing.take(layers)


def usual_seconds(seconds: FloatArray) -> FloatArray:
    """Return the typical time of each plan, (plans,), corrected for the pace of each round; seconds: (rounds, plans).

    A slow round slows all plans alike. Its pace is the median of their times relative to each plan's own median.
    """
    pace = np.median(seconds / np.median(seconds, axis=0), axis=1, keepdims=True)
    return np.asarray(np.median(seconds / pace, axis=0), dtype=np.float64)


def random_plans(
    blocks: IntArray, most: IntArray, layers: Sequence[str], count: int, generator: np.random.Generator
) -> list[TimedPlan]:
    """Plans of all kinds: one rank or many, any depth, all modules or some, no layer again, some or all.

    Args:
        blocks: the layer of each module, int64 (modules,).
        most: the highest rank of each, int64 (modules,).
        layers: names of the layers that can run again.
        count: how many plans.
        generator: draws them.
    """
    ladder = RankLadder().array[1:]
    plans: list[TimedPlan] = []
    while len(plans) < count:
        ranks = generator.choice(ladder, size=len(blocks)) if len(plans) % 2 else np.full(len(blocks), 8)
        if not generator.integers(3):
            ranks = np.full(len(blocks), generator.choice(ladder))
        adapted = generator.random(len(blocks)) < generator.choice([0.2, 0.5, 1.0])
        adapted &= blocks >= generator.integers(blocks.max() + 1)
        again = generator.random(len(layers)) < generator.choice([0.0, 0.5, 1.0])
        names = tuple(name for name, runs in zip(layers, again.tolist(), strict=True) if runs)
        if adapted.any():
            plans.append((np.where(adapted, np.minimum(ranks, most), 0), names))
    return plans


def accuracy(predicted: FloatArray, measured: FloatArray) -> Figures:
    """Errors of predictions relative to what was measured, and the rank correlation; both (plans,)."""
    errors = predicted / measured - 1
    return {
        "median_error": float(np.median(np.abs(errors))),
        "worst_error": float(np.abs(errors).max()),
        "mean_error": float(errors.mean()),
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "least_s": float(measured.min()),
        "most_s": float(measured.max()),
    }


def predicted_and_measured(case: TimedModel, plans: int, rounds: int) -> Figures:
    """How well random plans of one model are predicted, in seconds and as shares of a step of plain LoRA.

    Shares do not depend on the machine's pace.
    """
    blocks = np.array([target.block for target in case.targets])
    drawn = random_plans(blocks, case.most, case.layers, plans, np.random.default_rng(0))
    plain: TimedPlan = (np.minimum(REFERENCE_RANK, case.most), ())
    seconds = case.seconds([*drawn, plain], rounds)
    measured = usual_seconds(np.stack([*seconds.values()], axis=1))
    predicted = np.array([case.time.seconds(*plan) for plan in (*drawn, plain)])
    shares = accuracy(predicted[:-1] / predicted[-1], measured[:-1] / measured[-1])
    return accuracy(predicted[:-1], measured[:-1]) | {"median_share_error": shares["median_error"]}


def _cases(quick: bool) -> dict[str, Callable[[], TimedModel]]:
    if quick:
        size = Size(layers=6, width=128, vocabulary=1024, rows=4)
        return {"llama-6x128": lambda: TimedModel("llama", size, random_model("llama", size, 0), 0, checkpoint=True)}
    deep, wide = Size(layers=30, width=256), Size(vocabulary=30_000)
    return {
        LLAMA: lambda: TimedModel("llama", deep, random_model("llama", deep, 0), 0, checkpoint=True),
        MINILM: lambda: TimedModel(
            "bert", wide, load_model(MINILM, "classification", ("0", "1"), None), 0, checkpoint=True
        ),
    }


def benchmark(options: Options, console: Console) -> Figures:
    """Measure, print the tables, and return all figures.

    Raises:
        ConfigError: an option is out of range.
    """
    if options.plans < 3 or options.rounds < 1:
        raise ConfigError(f"--plans is at least 3, --rounds at least 1; got {options.plans} and {options.rounds}.")
    plans = 12 if options.quick else options.plans
    figures: Figures = {**machine_facts(torch.device("cpu")), "quick": options.quick, "plans": plans}
    rows: list[list[str]] = []
    for name, make in with_progress(list(_cases(options.quick).items()), "models"):
        with isolated():
            found = predicted_and_measured(make(), plans, options.rounds)
        figures |= {f"{name}.{key}": value for key, value in found.items()}
        errors = ("median_share_error", "median_error", "worst_error", "mean_error")
        shares = [f"{found[key]:.1%}" for key in errors]
        times = f"{found['least_s']:.3g} to {found['most_s']:.3g} s"
        rows.append([name, times, *shares, f"{found['rank_correlation']:.3f}"])
    columns = ("model", "steps", "median error of shares", "of seconds", "largest", "mean", "rank correlation")
    console.print(make_table(f"Predicted time of a step, {plans} random plans each", columns, rows))
    return figures
