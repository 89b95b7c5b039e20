"""Many proxy fine-tunes at once on one frozen base: the same episodes as `Episode`, stacked.

Losses, signals, observations and rank changes are those of a PEFT model (tests/env/episodes/test_slots.py compares
them); only the arithmetic runs for all episodes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...allocation.controller import RankController
from ...allocation.observation import Observation
from ...allocation.plan import Plan, uniform_ranks
from ...allocation.policy import Decision
from ...allocation.probe import ProbeResult
from ...allocation.problem import AllocationProblem
from ...allocation.schedule import DecisionSchedule
from ...common.arrays import IntArray
from ...errors import ConfigError
from ...lora.ladder import REFERENCE_RANK
from ...lora.signals import base_norms
from ...lora.stacked.resize import Move, reset_runs, set_stacked_ranks
from ...lora.stacked.run import StackedMeter, StackedRun
from ..proxies.adapted import adapted_base
from ..tasks.finetune import Reference
from ..tasks.proxy_finetune import ProxyFineTune, first_problem
from ..tasks.proxy_task import ProxyTask
from .single import new_controller, rate_at, unknown_signals
from .stack_trainer import Lane, StackTrainer

REMEMBERED = 1024
"""Tasks whose probes, and whose references, are remembered beside those under way; the suites repeat fewer."""


@dataclass(eq=False)
class StackedEpisode:
    """One episode under way.

    Attributes:
        task: what is fine-tuned.
        row: where its adapters lie.
        controller: its link to decisions.
        step: optimiser steps done.
        failed: whether a loss was not finite.
    """

    task: ProxyTask
    row: int
    controller: RankController[StackedRun]
    step: int = 0
    failed: bool = False

    @property
    def until(self) -> int:
        """The step before which the next decision falls, or the end."""
        return self.controller.until

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.failed or self.step >= self.task.steps


class StackedEpisodes:
    """Episodes of tasks on one base, in numbered slots.

    Args:
        base: name of the proxy base of all tasks.
        schedule: when ranks are decided.
        slots: how many episodes can be under way at once.
        compiled: run the model through torch.compile; see `StackedAdapters`.
        device: where to train.

    All tasks must have the same batch size and length. A task's results do not depend on what runs beside it.
    """

    base: str
    schedule: DecisionSchedule

    def __init__(
        self,
        base: str,
        schedule: DecisionSchedule,
        slots: int,
        *,
        compiled: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.base, self.schedule = base, schedule
        self.device: torch.device = torch.device(device)
        self.under_way: dict[int, StackedEpisode] = {}
        self._targets = adapted_base(base)[1]
        self._trainer = StackTrainer(base, slots, compiled=compiled, device=self.device)
        self._adapters = self._trainer.adapters
        self._base_norms = base_norms(self._targets)
        self._probes: dict[ProxyTask, ProbeResult] = {}
        self._references: dict[ProxyTask, Reference] = {}
        self._shape: tuple[int, int] | None = None

    @property
    def module_count(self) -> int:
        """Target modules of the base."""
        return len(self._targets)

    def start(self, tasks: Mapping[int, ProxyTask]) -> None:
        """Begin episodes; a slot's last one is forgotten.

        Args:
            tasks: by slot.

        Raises:
            ConfigError: a task is of another base, or its batches have another shape than those of the other tasks.
        """
        rows = self._rows_for(tasks)
        self._probe({task: row for task, row in rows.items() if task not in self._probes})
        reset_runs(self._adapters, {slot: task.seed for slot, task in tasks.items()})
        for slot, task in tasks.items():
            self.under_way[slot] = StackedEpisode(task, slot, self._controller(task, slot))
        self._forget(self._probes, tasks.values())

    def _forget(self, known: dict[ProxyTask, Any], used: Iterable[ProxyTask]) -> None:
        """Drop what was used longest ago of what is known of tasks, so that fresh tasks do not fill the memory.

        Args:
            known: by task, the one that was used last at the end.
            used: tasks that are used now; they are kept, and so are those under way.
        """
        under_way = (episode.task for episode in self.under_way.values())
        kept = [task for task in dict.fromkeys((*under_way, *used)) if task in known]
        known |= {task: known.pop(task) for task in kept}
        for task in list(known)[: max(0, len(known) - max(REMEMBERED, len(kept)))]:
            del known[task]

    def _rows_for(self, tasks: Mapping[int, ProxyTask]) -> dict[ProxyTask, int]:
        """One row for each different task, free from now on."""
        shapes = {self._checked(task) for task in tasks.values()}
        if len(shapes) > 1:
            raise ConfigError(f"Stacked episodes share one base and one batch shape; got {sorted(shapes)}.")
        self._shape = next(iter(shapes), self._shape)
        for slot in tasks:
            self.under_way.pop(slot, None)
        return {task: slot for slot, task in tasks.items()}

    def _checked(self, task: ProxyTask) -> tuple[int, int]:
        """The batch shape of a task that fits those before it."""
        shape = (task.batch_size, task.length)
        if task.base != self.base or (self._shape or shape) != shape:
            raise ConfigError(
                f"Stacked episodes share one base and one batch shape: {self.base} and {self._shape or shape}; got "
                f"task {task.id} with {shape}."
            )
        return shape

    def _controller(self, task: ProxyTask, row: int) -> RankController[StackedRun]:
        run = StackedRun(self._adapters, row, self._base_norms)
        return new_controller(ProxyFineTune(task), run, self.schedule, self._probes[task])

    def reference(self, task: ProxyTask) -> Reference:
        """What fixed allocations of a task achieve that knows it, or that was given to `measure_references`."""
        return task.reference or self._references[task]

    def problem(self, task: ProxyTask) -> AllocationProblem:
        """The plans that a task's first decision allows."""
        self._checked(task)
        return first_problem(task)

    # Decisions --------------------------------------------------------------------------------------------------------

    def observe(self, slot: int, interval_loss: float | None = None) -> Observation:
        """The next decision's input."""
        episode = self.under_way[slot]
        return episode.controller.observe(episode.step, interval_loss)

    def apply(self, slot: int, decision: Decision) -> Plan:
        """Take a decision; its rank change is made with those of the other slots, when training goes on."""
        episode = self.under_way[slot]
        return episode.controller.apply(decision, episode.step)

    def advance(self, slots: Sequence[int]) -> dict[int, float | None]:
        """Train each of these episodes until its next decision or its end.

        Returns:
            The mean training loss of each interval; None where a loss was not finite, which ends the episode.
        """
        episodes = [self.under_way[slot] for slot in slots]
        runs = [episode.controller.adapters for episode in episodes]
        set_stacked_ranks(self._adapters, [run.move for run in runs if run.move])
        lanes = []
        for episode, run in zip(episodes, runs, strict=True):
            run.move = None
            task, meter = episode.task, None if episode.controller.finished else run.meter
            lanes.append(Lane(task, episode.row, episode.step, episode.until, _decay(task), meter))
        self._trainer.train(lanes)
        for episode, lane in zip(episodes, lanes, strict=True):
            episode.step, episode.failed = lane.step, lane.failed
        return {
            slot: None if lane.failed else float(np.mean(lane.losses)) for slot, lane in zip(slots, lanes, strict=True)
        }

    def held_out_losses(self, slots: Sequence[int]) -> dict[int, float]:
        """Losses on the held-out sets, now, in nats."""
        tasks = {self.under_way[slot].row: self.under_way[slot].task for slot in slots}
        return dict(zip(slots, self._trainer.held_out(tasks), strict=True))

    # Before an episode ------------------------------------------------------------------------------------------------

    def _probe(self, tasks: Mapping[ProxyTask, int]) -> None:
        """Probe tasks that are new, each in a free row."""
        if not tasks:
            return
        reset_runs(self._adapters, {row: task.seed for task, row in tasks.items()}, scaled_as=REFERENCE_RANK)
        lanes = []
        for task, row in tasks.items():
            rows, meter = min(self.schedule.probe_batch, task.batch_size), self._meter(row)
            lanes.append(Lane(task, row, 0, self.schedule.probe_steps, _constant(task), meter, rows))
        self._trainer.train(lanes)
        for lane in lanes:
            assert lane.meter is not None
            failed = lane.failed
            self._probes[lane.task] = (
                unknown_signals(self.module_count) if failed else ProbeResult.of(lane.meter.read(), lane.losses)
            )

    def measure_references(self, tasks: Mapping[int, ProxyTask]) -> None:
        """Run the uniform plan of tasks that do not know its result; a slot's last episode is forgotten.

        Args:
            tasks: by slot.

        Raises:
            ConfigError: see `start`.
        """
        rows = {task: row for task, row in self._rows_for(tasks).items() if task.reference is None}
        unknown = {row: task for task, row in rows.items() if task not in self._references}
        if not unknown:
            return
        reset_runs(self._adapters, {row: task.seed for row, task in unknown.items()})
        initial = self._trainer.held_out(unknown)
        final = self.run_fixed({row: (task, uniform_ranks(self.problem(task))) for row, task in unknown.items()})
        for task, before, after in zip(unknown.values(), initial, final, strict=True):
            self._references[task] = Reference(before, after if np.isfinite(after) else before)
        self._forget(self._references, tasks.values())

    def run_fixed(self, runs: Mapping[int, tuple[ProxyTask, IntArray]]) -> list[float]:
        """Train whole tasks at fixed ranks in free slots; returns their held-out losses, NaN where training failed.

        Args:
            runs: task and ranks (modules,) by slot.
        """
        reset_runs(self._adapters, {row: task.seed for row, (task, _) in runs.items()})
        moves = [Move(row, ranks, task.seed, 0) for row, (task, ranks) in runs.items()]
        set_stacked_ranks(self._adapters, moves)
        lanes = [Lane(task, row, 0, task.steps, _decay(task), None) for row, (task, _) in runs.items()]
        self._trainer.train(lanes)
        losses = self._trainer.held_out({row: task for row, (task, _) in runs.items()})
        return [math.nan if lane.failed else loss for lane, loss in zip(lanes, losses, strict=True)]

    def _meter(self, row: int) -> StackedMeter:
        return StackedMeter(self._adapters, row, self._base_norms)


def _decay(task: ProxyTask) -> Callable[[int], float]:
    return lambda step: rate_at(task.learning_rate, step, task.steps)


def _constant(task: ProxyTask) -> Callable[[int], float]:
    return lambda step: task.learning_rate
