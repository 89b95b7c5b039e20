"""Many proxy fine-tunes at once on one frozen base: the same episodes as `Episode`, stacked.

Losses, signals, observations and rank changes are those of a PEFT model (tests/env/test_stacked.py compares them); only
the arithmetic runs for all episodes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...allocation.controller import RankController
from ...allocation.observation import Observation
from ...allocation.plan import Plan, uniform_ranks
from ...allocation.policy import Decision
from ...allocation.probe import FIRST_LOSSES, ProbeResult
from ...allocation.problem import AllocationProblem
from ...allocation.schedule import DecisionSchedule
from ...common.arrays import IntArray
from ...errors import ConfigError
from ...lora.ladder import REFERENCE_RANK
from ...lora.signals import base_norms
from ...lora.stacked.adapters import StackedAdapters
from ...lora.stacked.resize import Move, reset_runs, set_stacked_ranks
from ...lora.stacked.run import StackedMeter, StackedRun, accumulate_all
from ..proxies.adapted import adapted_base
from ..proxies.bases import load_base_model
from ..tasks.finetune import Reference
from ..tasks.proxy_finetune import ProxyFineTune, TaskData, load_task, task_losses
from ..tasks.proxy_task import ProxyTask
from .single import MAX_GRAD_NORM, new_controller, rate_at, unknown_signals

EVAL_TOKENS = 8192
"""Tokens of a forward pass without gradients, over all runs."""


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
        controller = self.controller
        return self.task.steps if controller.finished else controller.decision_steps[controller.decision]

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.failed or self.step >= self.task.steps


@dataclass(eq=False)
class _Lane:
    """One row in training: an episode, a probe or a uniform run."""

    task: ProxyTask
    row: int
    step: int
    until: int
    rate: Callable[[int], float]
    meter: StackedMeter | None
    rows: int | None = None
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    data: TaskData = field(init=False)

    def __post_init__(self) -> None:
        self.data = load_task(self.task)  # held here: more tasks can be in training than the cache of tasks holds


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
        self.device = torch.device(device)
        self.under_way: dict[int, StackedEpisode] = {}
        self._targets = adapted_base(base)[1]
        model = load_base_model(base).to(self.device)
        model.config.use_cache = False  # nothing is generated
        self._adapters = StackedAdapters(model, self._targets, slots, compiled=compiled)
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
        fine_tune = ProxyFineTune(task)
        cost = fine_tune.cost()
        most = np.array([target.max_rank for target in self._targets], dtype=np.int64)
        ranks = np.ones(len(most), dtype=np.int64)
        limit = fine_tune.limit.resolve(cost, most, self._targets[0].weight_a.device)
        return AllocationProblem.of(self._targets, cost, limit.value, ranks=ranks)

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
            lanes.append(_Lane(task, episode.row, episode.step, episode.until, _decay(task), meter))
        self._train(lanes)
        for episode, lane in zip(episodes, lanes, strict=True):
            episode.step, episode.failed = lane.step, lane.failed
        return {
            slot: None if lane.failed else float(np.mean(lane.losses)) for slot, lane in zip(slots, lanes, strict=True)
        }

    def held_out_losses(self, slots: Sequence[int]) -> dict[int, float]:
        """Losses on the held-out sets, now, in nats."""
        tasks = {self.under_way[slot].row: self.under_way[slot].task for slot in slots}
        return dict(zip(slots, self._held_out(tasks), strict=True))

    # Training ---------------------------------------------------------------------------------------------------------

    def _train(self, lanes: Sequence[_Lane]) -> None:
        """Train each lane to its end; one that meets a loss that is not finite stops there."""
        adapters = self._adapters
        while active := [lane for lane in lanes if lane.step < lane.until and not lane.failed]:
            compiled = adapters.compiled and active[0].rows is None
            # A compiled model is for one number of runs: rows that do not train see some other lane's batch.
            crew = self._all_rows(active) if compiled else {lane.row: lane for lane in active}
            with adapters.running(list(crew), compiled=compiled) as model:
                losses = self._losses(model, list(crew.values()))
                adapters.backward(losses)
            by_row = dict(zip(crew, losses.tolist(), strict=True))
            for lane in active:
                lane.losses.append(by_row[lane.row])
                lane.failed = not math.isfinite(lane.losses[-1])
            self._step([lane for lane in active if not lane.failed])

    def _all_rows(self, active: Sequence[_Lane]) -> dict[int, _Lane]:
        lanes = {lane.row: lane for lane in active}
        return {row: lanes.get(row, active[0]) for row in range(len(self._adapters.ranks))}

    def _step(self, lanes: Sequence[_Lane]) -> None:
        """Clip, take in signals and step."""
        if not lanes:
            return
        rows = [lane.row for lane in lanes]
        squares = self._adapters.clip(rows, MAX_GRAD_NORM)
        metered = [index for index, lane in enumerate(lanes) if lane.meter]
        accumulate_all([lane.meter for lane in lanes if lane.meter], squares[metered])
        self._adapters.step(rows, [lane.rate(lane.step) for lane in lanes])
        for lane in lanes:
            lane.step += 1

    def _losses(self, model: Callable[..., Any], lanes: Sequence[_Lane]) -> torch.Tensor:
        """The loss of the next batch of each lane, (lanes,)."""
        batches = [(lane, lane.data, lane.step % lane.task.steps) for lane in lanes]
        inputs = torch.cat([data.inputs[step, : lane.rows] for lane, data, step in batches])
        labels = torch.cat([data.labels[step, : lane.rows] for lane, data, step in batches])
        teachers = [None if data.teacher is None else data.teacher[step, : lane.rows] for lane, data, step in batches]
        logits = model(input_ids=inputs.to(self.device)).logits
        return self._split(logits, labels, teachers)

    def _split(
        self, logits: torch.Tensor, labels: torch.Tensor, teachers: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """The loss of each run in a batch, by its own kind of loss, (runs,)."""
        runs = len(teachers)
        taught = [index for index, teacher in enumerate(teachers) if teacher is not None]
        if len(taught) in (0, runs):
            teacher = torch.cat([t for t in teachers if t is not None]).to(self.device) if taught else None
            return task_losses(logits, labels.to(self.device), teacher, runs)
        by_run = zip(logits.chunk(runs), labels.to(self.device).chunk(runs), teachers, strict=True)
        return torch.cat([task_losses(a, b, None if c is None else c.to(self.device)) for a, b, c in by_run])

    @torch.no_grad()
    def _held_out(self, tasks: Mapping[int, ProxyTask]) -> list[float]:
        """Held-out loss of each of these rows, in nats."""
        losses = {}
        for count in sorted({task.eval_rows for task in tasks.values()}):
            rows = [row for row, task in tasks.items() if task.eval_rows == count]
            data = [load_task(tasks[row]) for row in rows]
            inputs = torch.stack([each.held_out_inputs for each in data]).to(self.device)
            size = max(1, EVAL_TOKENS // (len(rows) * inputs.shape[2]))
            with self._adapters.running(rows) as model:
                parts = [model(input_ids=part.flatten(0, 1)).logits for part in torch.split(inputs, size, dim=1)]
            logits = torch.cat([part.unflatten(0, (len(rows), -1)) for part in parts], dim=1)
            for row, each, answers in zip(rows, data, logits, strict=True):
                losses[row] = float(each.held_out_loss_of(answers))
        return [losses[row] for row in tasks]

    # Before an episode ------------------------------------------------------------------------------------------------

    def _probe(self, tasks: Mapping[ProxyTask, int]) -> None:
        """Probe tasks that are new, each in a free row."""
        if not tasks:
            return
        reset_runs(self._adapters, {row: task.seed for task, row in tasks.items()}, scaled_as=REFERENCE_RANK)
        lanes = []
        for task, row in tasks.items():
            rows, meter = min(self.schedule.probe_batch, task.batch_size), self._meter(row)
            lanes.append(_Lane(task, row, 0, self.schedule.probe_steps, _constant(task), meter, rows))
        self._train(lanes)
        for lane in lanes:
            assert lane.meter is not None
            first = float(np.mean(lane.losses[:FIRST_LOSSES]))
            failed = lane.failed
            self._probes[lane.task] = (
                unknown_signals(self.module_count) if failed else ProbeResult(lane.meter.read(), first)
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
        initial = self._held_out(unknown)
        final = self.run_fixed({row: (task, uniform_ranks(self.problem(task))) for row, task in unknown.items()})
        for task, before, after in zip(unknown.values(), initial, final, strict=True):
            self._references[task] = Reference(before, after if np.isfinite(after) else before)

    def run_fixed(self, runs: Mapping[int, tuple[ProxyTask, IntArray]]) -> list[float]:
        """Train whole tasks at fixed ranks in free slots; returns their held-out losses, NaN where training failed.

        Args:
            runs: task and ranks (modules,) by slot.
        """
        reset_runs(self._adapters, {row: task.seed for row, (task, _) in runs.items()})
        moves = [Move(row, ranks, task.seed, 0) for row, (task, ranks) in runs.items()]
        set_stacked_ranks(self._adapters, moves)
        lanes = [_Lane(task, row, 0, task.steps, _decay(task), None) for row, (task, _) in runs.items()]
        self._train(lanes)
        losses = self._held_out({row: task for row, (task, _) in runs.items()})
        return [math.nan if lane.failed else loss for lane, loss in zip(lanes, losses, strict=True)]

    def _meter(self, row: int) -> StackedMeter:
        return StackedMeter(self._adapters, row, self._base_norms)


def _decay(task: ProxyTask) -> Callable[[int], float]:
    return lambda step: rate_at(task.learning_rate, step, task.steps)


def _constant(task: ProxyTask) -> Callable[[int], float]:
    return lambda step: task.learning_rate
