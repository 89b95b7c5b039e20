"""All methods on one model, one step of each in turn: what each step takes, and what each method holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from ...common.arrays import FloatArray
from ...common.statistics import Estimate, Statistic
from ..harness import clock_for, estimate_cycles, interleave, paired_ratios, whole_cycle
from ..learner import Learner
from ..models import LORA, Family, Size, random_loader, random_model
from .contenders import AdaLora, RankPilot

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
