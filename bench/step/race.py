"""All methods on one model, one step of each in turn: what each step takes, and what each method holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedModel

from ...common.arrays import FloatArray
from ...common.statistics import Estimate, Statistic
from ...memory.peak_meter import PeakMeter
from ...memory.recording import Batch
from ..harness import estimate_cycles, interleave, paired_ratios, whole_cycle
from ..models import TASKS, Family, Size, random_loader, random_model
from .contenders import AdaLora, PlainLora, RankPilot

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
        seconds: of each timed step, (steps,).
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
    with TemporaryDirectory() as folder:
        methods = _methods(family, size, course, device, seed, Path(folder))
        watches = {name: _Watch(method, course) for name, method in methods.items()}
        batches = [_moved(batch, device) for batch in random_loader(family, size, seed)]

        def after_round(turn: int) -> None:
            for watch in watches.values():
                watch.count_changes(turn)
            if on_round:
                on_round()

        work = {name: watch.train_on(batches) for name, watch in watches.items()}
        seconds = interleave(work, course.steps, device, after_round=after_round)
    return {name: watch.result(seconds[name]) for name, watch in watches.items()}


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _methods(
    family: Family, size: Size, course: Course, device: torch.device, seed: int, folder: Path
) -> dict[str, PlainLora]:
    """The participants, each with a model of its own from the same weights."""
    task = TASKS[family]

    def base() -> PreTrainedModel:
        return random_model(family, size, seed).to(device)

    loader = random_loader(family, size, seed)
    return {
        "plain": PlainLora(base(), task),
        "plain_again": PlainLora(base(), task),
        "adalora": AdaLora(base(), task, course.planned, PERIOD),
        "rankpilot": RankPilot(base(), task, loader, course.planned, PERIOD, folder, seed),
    }


class _Watch:
    """Looks at one method's ranks and memory, off the clock."""

    def __init__(self, method: PlainLora, course: Course) -> None:
        self.method = method
        self.course = course
        self.rank_changes = 0
        self.peak_bytes = 0
        self._ranks = method.ranks()

    def train_on(self, batches: Sequence[Batch]) -> Callable[[int], None]:
        """The method's step as work for `interleave`."""

        def step(turn: int) -> None:
            batch = batches[turn % len(batches)]
            if turn == self.course.measured:
                self._measure(batch)
            else:
                self.method.step(batch)

        return step

    def _measure(self, batch: Batch) -> None:
        method, meter = self.method, PeakMeter()
        meter.begin(method.model, method.optimizer, method.buffer_bytes())
        method.step(batch)
        self.peak_bytes = meter.end(method.steps, method.model) or 0

    def count_changes(self, turn: int) -> None:
        """Count the modules whose rank changed in this round."""
        before, self._ranks = self._ranks, self.method.ranks()
        # AdaLoRA names no ranks before its first allocation, which is no change of rank.
        if before and turn in self.course.timed:
            self.rank_changes += sum(a != b for a, b in zip(before, self._ranks, strict=True))

    def result(self, seconds: FloatArray) -> Result:
        """All that was seen."""
        timed = slice(self.course.timed.start, self.course.timed.stop)
        return Result(
            seconds=seconds[timed],
            own_seconds=np.array(self.method.own_seconds)[timed],
            adapter_bytes=self.method.held_bytes(),
            peak_bytes=self.peak_bytes,
            rank_changes=self.rank_changes,
            setup_seconds=getattr(self.method, "setup_seconds", 0.0),
        )
