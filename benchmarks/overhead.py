"""What moving ranks costs: time and memory of a training step beside plain LoRA and AdaLoRA."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig
from rankpilot.common.arrays import FloatArray
from rankpilot.common.devices import find_device
from rankpilot.common.errors import ConfigError
from rankpilot.common.statistics import Estimate, Statistic
from rankpilot.common.text import format_bytes, make_table
from rankpilot.cost.budget import Budget
from rankpilot.decide.applier import PlanApplier
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.pilot import RankPilot as Pilot
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.adapters import PeftAdapters
from rankpilot.lora.spec import REFERENCE_RANK
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .harness import (
    Figures,
    clock_for,
    estimate_cycles,
    estimate_figures,
    interleave,
    machine_facts,
    paired_ratios,
    usual_step,
    whole_cycle,
)
from .models import FAMILIES, LEARNING_RATE, LORA, Family, Learner, Size, random_loader, random_model


class AdaLora(Learner):
    """PEFT's AdaLoRA, rank 12 pruned to a mean of 8 over the whole run, without phases before or after.

    Args:
        base: the model, on its device.
        family: of the model.
        total_steps: length of the run; allocations go on until its end.
        period: steps between allocations.
    """

    def __init__(self, base: PreTrainedModel, family: Family, total_steps: int, period: int) -> None:
        schedule = {"total_step": total_steps, "deltaT": period}
        super().__init__(base, AdaLoraConfig(init_r=12, target_r=REFERENCE_RANK, **schedule, **LORA[family]))

    def on_optimizer_step(self) -> None:
        """Importance of every weight, and an allocation at each `deltaT`-th step, counted from 1."""
        self.model.base_model.update_and_allocate(self.steps + 1)

    def ranks(self) -> tuple[int, ...]:
        """Components that are not masked, by module; empty before the first allocation."""
        pattern = self.model.peft_config["default"].rank_pattern or {}
        return tuple(sum(kept) for kept in pattern.values())

    def buffer_bytes(self) -> int:
        """The importance of each parameter and its two averages."""
        allocator = self.model.base_model.rankallocator
        tables = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        storages = (tensor.untyped_storage() for by_name in tables for tensor in by_name.values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class RankPilot(Learner):
    """The core of a fine-tune with the rule signal-mean, called as the Trainer callback calls it.

    So the steps hold all that a fine-tune pays for: signals, decisions, resizes, the decision log, the look at the
    gradients, the checks of the peak. The budget is uniform rank 8's number of parameters: under a budget of bytes low
    modules would lose their adapters, which makes steps faster and would hide what the callback costs.

    Args:
        base: the model, on its device.
        family: of the model.
        loader: what the probe before the first step draws from.
        total_steps: length of the run.
        period: steps between decisions.
        folder: for the decision log.
        seed: of the probe and of fresh rows.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        family: Family,
        loader: DataLoader[Any],
        total_steps: int,
        period: int,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__(base, LoraConfig(**LORA[family]))
        parameters = sum(min(REFERENCE_RANK, t.max_rank) * (t.d_in + t.d_out) for t in self.targets)
        budget, schedule = Budget("parameters", parameters), every(period, total_steps)
        self.pilot: Pilot = Pilot("signal-mean", budget, schedule=schedule, log=folder / "decisions", seed=seed)
        run = TrainingRun.of_loader(
            self.model, self.optimizer, loader, total_steps=total_steps, learning_rate=LEARNING_RATE
        )
        start = time.perf_counter()
        self.pilot.begin(run)
        self.setup_seconds: float = time.perf_counter() - start

    def on_step_begin(self) -> None:
        """Start to measure the peak, where it is due."""
        self.pilot.before_step()

    def on_pre_optimizer_step(self) -> None:
        """Take in signals."""
        self.pilot.before_optimizer_step(0.0)

    def on_step_end(self) -> None:
        """Decide and resize, where it is due."""
        self.pilot.after_step()

    @property
    def applier(self) -> PlanApplier[PeftAdapters]:
        """The link to the adapters."""
        assert self.pilot.applier is not None, "the run was begun with this object"
        return self.pilot.applier

    def ranks(self) -> tuple[int, ...]:
        """Real ranks by module."""
        return tuple(target.rank for target in self.applier.targets)

    def buffer_bytes(self) -> int:
        """The averages of gradients that the signals come from."""
        return self.applier.adapters.meter.buffer_bytes


def every(period: int, total_steps: int) -> DecisionSchedule:
    """A schedule with a decision before the first step and after each `period` steps."""
    # Half a step more than needed, so that no rounding puts a decision one step early.
    later = ((step + 0.5) / total_steps for step in range(period, total_steps, period))
    return DecisionSchedule(fractions=(0.0, *later))


PERIOD = 10
"""Steps between decisions; a cycle is so many steps, with a decision after its last one."""


@dataclass(frozen=True)
class Course:
    """How long a run is: a cycle to warm up, timed cycles, and a few steps more, the last of which is measured.

    Attributes:
        cycles: timed cycles of ten steps.
    """

    cycles: int

    @property
    def timed(self) -> range:
        """The timed steps."""
        return range(PERIOD, PERIOD * (self.cycles + 1))

    @property
    def measured(self) -> int:
        """The step whose memory is measured: the last, in mid-interval, when every method's buffers exist."""
        return self.timed.stop + PERIOD // 2

    @property
    def steps(self) -> int:
        """Steps of each method."""
        return self.measured + 1

    @property
    def planned(self) -> int:
        """Steps of the run that the methods believe in: it goes on, so that none of them comes to its end."""
        return self.steps + PERIOD


@dataclass(frozen=True, eq=False)
class Result:
    """What an interleaved run gave for one method.

    Attributes:
        seconds: of each timed step, (steps,); CPU time on a CPU.
        own_seconds: the part of it that is the method's own work, (steps,).
        adapter_bytes: of weights, gradients, optimiser state and further buffers, at the measured step.
        peak_bytes: those and the tensors saved for backward.
        rank_changes: how often a module had another rank after a timed step than before it.
        setup_seconds: taken once, before the first step.
    """

    seconds: FloatArray
    own_seconds: FloatArray
    adapter_bytes: int
    peak_bytes: int
    rank_changes: int
    setup_seconds: float

    def against(self, plain: Result, statistic: Statistic) -> Estimate:
        """Time relative to plain LoRA's, as `usual_step` or `whole_cycle` sums it up."""
        return estimate_cycles(paired_ratios(self.seconds, plain.seconds, PERIOD), statistic)

    def own_share(self, plain: Result) -> float:
        """Own work of a cycle over plain LoRA's usual time for one."""
        a_step = estimate_cycles(self.own_seconds.reshape(-1, PERIOD), whole_cycle).value
        return a_step / float(np.median(plain.seconds))

    def own_share_of_a_step(self, plain: Result) -> float:
        """Own work of a usual step, between two decisions, over plain LoRA's usual time for one."""
        return float(np.median(self.own_seconds) / np.median(plain.seconds))


def run(
    family: Family,
    size: Size,
    course: Course,
    device: torch.device,
    seed: int,
    on_round: Callable[[], object] | None = None,
) -> dict[str, Result]:
    """Train one model with all methods, interleaved.

    Args:
        family: which model.
        size: how large.
        course: how long.
        device: where.
        seed: of everything.
        on_round: called after each round, off the clock.

    Returns:
        Results by method.
    """
    changes: Counter[str] = Counter()
    peaks: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        methods = _methods(family, size, course, device, seed, Path(folder))
        ranks = {name: method.ranks() for name, method in methods.items()}
        batches = [
            {name: rows.to(device) for name, rows in batch.items()} for batch in random_loader(family, size, seed)
        ]

        def step(name: str, turn: int) -> None:
            method, batch = methods[name], batches[turn % len(batches)]
            if turn == course.measured:
                peaks[name] = method.measured_step(batch)
            else:
                method.step(batch)

        def after_round(turn: int) -> None:
            for name, method in methods.items():
                before, ranks[name] = ranks[name], method.ranks()
                # AdaLoRA names no ranks before its first allocation, which is no change of rank.
                if before and turn in course.timed:
                    changes[name] += sum(a != b for a, b in zip(before, ranks[name], strict=True))
            if on_round:
                on_round()

        work = {name: partial(step, name) for name in methods}
        seconds = interleave(work, course.steps, device, after_round=after_round, clock=clock_for(device))
    timed = slice(course.timed.start, course.timed.stop)
    return {
        name: Result(
            seconds=seconds[name][timed],
            own_seconds=np.array(method.own_seconds)[timed],
            adapter_bytes=method.held_bytes(),
            peak_bytes=peaks[name],
            rank_changes=changes[name],
            setup_seconds=method.setup_seconds,
        )
        for name, method in methods.items()
    }


def _methods(
    family: Family, size: Size, course: Course, device: torch.device, seed: int, folder: Path
) -> dict[str, Learner]:
    """The participants, each with a model of its own from the same weights."""

    def base() -> PreTrainedModel:
        return random_model(family, size, seed).to(device)

    loader = random_loader(family, size, seed)
    return {
        "plain": Learner(base(), LoraConfig(**LORA[family]), seed=seed),
        "plain_again": Learner(base(), LoraConfig(**LORA[family]), seed=seed),
        "adalora": AdaLora(base(), family, course.planned, PERIOD),
        "rankpilot": RankPilot(base(), family, loader, course.planned, PERIOD, folder, seed),
    }


BAR = 1.01
"""What a cycle may cost, relative to plain LoRA."""

OWN_BAR = 0.005
"""What rankpilot's own work in a step between two decisions may take, as a share of plain LoRA's step."""

LABELS = {"plain": "plain LoRA", "plain_again": "once more", "adalora": "AdaLoRA", "rankpilot": "rankpilot"}


FULL = Size(), Course(cycles=6)
QUICK = Size(layers=2, rows=4), Course(cycles=4)


@dataclass(frozen=True)
class Options:
    """Measure what rankpilot costs: time and memory of a training step beside plain LoRA and AdaLoRA.

    Trains a random BERT classifier and a random Llama on random tokens. Plain LoRA at rank 8, plain LoRA once more,
    PEFT's AdaLoRA from rank 12 to 8, and rankpilot with signal-mean and a decision after every tenth step run in one
    process: one step of each in turn, in changing order and on the same batches, so that noise hits all alike. A step
    is all of it: forward, backward, clipping, optimiser, and the method's own work. Times are CPU time, on a GPU wall
    time.

    Columns: "a step" is the median over steps of the time over plain LoRA's time in the same round; it leaves out
    decisions, which fall into one step of ten. "Ten steps" is the mean over the ten places in a cycle of the median
    at each: what a run pays, and the figure to quote. Intervals are 95 % (bootstrap over cycles); the second row
    shows what noise alone does. "Own work" is what the method does between the passes, timed by itself, over plain
    LoRA's step, in a usual step (figures hold the mean over ten as well): far less noisy, but blind to what it does to
    the passes.
    "Adapter" is the bytes of weights, gradients, optimiser state and further buffers; "peak" adds the tensors saved
    for the backward pass.

    The full run takes about eight minutes on two cores. Leave the machine alone meanwhile; where others use it too,
    OMP_NUM_THREADS=1 makes figures steadier.

    Attributes:
        quick: under a minute: two layers, four rows, fewer cycles. Steps are short, so that fixed costs weigh more.
        json: also write the figures to this file, as flat JSON with names like "bert.adalora.cycle_ratio".
        device: auto is CUDA where there is one.
        seed: of weights, batches and decisions, at least 0.
    """

    quick: bool = False
    json: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def figures_of(family: Family, results: dict[str, Result]) -> Figures:
    """One model's results by flat name; ratios are relative to plain LoRA, so it has none itself."""
    figures: Figures = {f"{family}.rankpilot.setup_seconds": results["rankpilot"].setup_seconds}
    plain = results["plain"]
    for name, result in results.items():
        prefix = f"{family}.{name}"
        figures[f"{prefix}.step_ms"] = float(1e3 * np.median(result.seconds))
        figures[f"{prefix}.adapter_bytes"] = result.adapter_bytes
        figures[f"{prefix}.peak_bytes"] = result.peak_bytes
        figures[f"{prefix}.rank_changes"] = result.rank_changes
        if result is plain:
            continue
        for kind, statistic in (("step", usual_step), ("cycle", whole_cycle)):
            figures |= estimate_figures(f"{prefix}.{kind}_ratio", result.against(plain, statistic))
        figures[f"{prefix}.total_ratio"] = float(result.seconds.sum() / plain.seconds.sum())
        figures[f"{prefix}.own_share"] = result.own_share(plain)
        figures[f"{prefix}.own_share_of_a_step"] = result.own_share_of_a_step(plain)
    return figures


def table_of(title: str, results: dict[str, Result]) -> Table:
    """One model's results for people."""
    columns = ("method", "a step", "ten steps", "own work", "adapter", "peak", "changes")
    rows, plain = [], results["plain"]
    for name, result in results.items():
        times = [f"{1e3 * np.median(result.seconds):.0f} ms", "", ""]
        if result is not plain:
            ratios = (result.against(plain, statistic) for statistic in (usual_step, whole_cycle))
            times = [f"{ratio.value:.3f}\n{ratio.low:.3f} to {ratio.high:.3f}" for ratio in ratios]
            times.append(f"{result.own_share_of_a_step(plain):.2%}")
        sizes = (format_bytes(size) for size in (result.adapter_bytes, result.peak_bytes))
        rows.append((LABELS[name], *times, *sizes, str(result.rank_changes)))
    return make_table(title, columns, rows)


def verdict(family: Family, results: dict[str, Result], *, quick: bool) -> str:
    """A sentence on whether rankpilot keeps to the bar; the steps of a quick run are too short to show that."""
    result = results["rankpilot"]
    cycle = result.against(results["plain"], whole_cycle)
    if quick:
        word = "not for a quick run"
    else:
        word = "kept" if cycle.high <= BAR else "missed" if cycle.low > BAR else "undecided, the noise is too large"
    own = result.own_share_of_a_step(results["plain"])
    kept = "not for a quick run" if quick else "kept" if own <= OWN_BAR else "missed"
    return (
        f"{family}: rankpilot's own work in a step between decisions takes {own:.2%} of plain LoRA's step. Bar "
        f"{OWN_BAR:.1%}: {kept}.\n"
        f"{family}: rankpilot's ten steps, one decision among them, take {cycle:.3f} of plain LoRA's. Bar {BAR}: "
        f"{word}. Before the first step it took {result.setup_seconds:.1f} s, once."
    )


def benchmark(options: Options, console: Console) -> Figures:
    """Run both models, print a table of each, and return all figures.

    Raises:
        ConfigError: the seed is negative, or the device is absent.
    """
    if options.seed < 0:
        raise ConfigError(f"--seed is at least 0; got {options.seed}.")
    device = find_device(options.device)
    size, course = QUICK if options.quick else FULL
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    figures |= asdict(size) | asdict(course)
    everything = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for family in FAMILIES:
            task = bar.add_task(f"{family}, rounds of four steps", total=course.steps)
            advance = partial(bar.advance, task)
            everything[family] = run(family, size, course, device, options.seed, on_round=advance)
            figures |= figures_of(family, everything[family])
    shape = f"{size.layers} layers x {size.width}, vocabulary {size.vocabulary}, {size.rows} x {size.length} tokens"
    for family, results in everything.items():
        console.print(table_of(f"{family}: {shape}, {course.cycles} cycles of {PERIOD} steps", results))
    for family, results in everything.items():
        console.print(verdict(family, results, quick=options.quick), highlight=False)
    return figures
