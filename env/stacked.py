"""Many proxy fine-tunes at once on one frozen base: the same episodes as `Episode`, stacked.

Losses, signals, observations and rank changes are those of a PEFT model (tests/env/test_stacked.py compares them); only
the arithmetic runs for all episodes together.

Runs are trained and evaluated in the order of their lowest adapters. A run computes nothing below its lowest adapter:
it joins the batch there, with hidden states that the frozen model computed once for all runs of its task. Losses are
those of a batch that holds all runs from the first block on, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ..common.arrays import IntArray
from ..decide.applier import PlanApplier, ProbeResult
from ..decide.observation import Observation
from ..decide.policy import Decision
from ..decide.rules import RULES
from ..decide.settings import DecisionSchedule
from ..errors import ConfigError
from ..lora.adapters import base_norms
from ..lora.spec import REFERENCE_RANK
from ..lora.stacked.adapters import StackedAdapters
from ..lora.stacked.blocks import FORWARD_TOKENS, Blocks, States
from ..lora.stacked.run import Move, StackedMeter, StackedRun, accumulate_all, reset_runs, set_stacked_ranks
from ..plan.plan import uniform_ranks
from ..plan.problem import AllocationProblem
from .bases import adapted_base, load_base_model
from .episode import MAX_GRAD_NORM, EpisodeLog, new_applier, rate_at, unknown_signals
from .proxy_finetune import ProxyFineTune, TaskData, first_problem, known_of, load_task
from .proxy_task import ProxyTask, Reference

CACHED_TOKENS = 2560
"""Tokens of a training pass on a CPU: what they compute in a layer of the proxy bases stays in a core's cache."""


def parts_of(lanes: Sequence[Lane], size: int) -> list[list[Lane]]:
    """Lanes in parts of at most `size`; those with the same batch stay together, as far as they fit."""
    alike: dict[tuple[int, int], list[Lane]] = {}
    for lane in lanes:
        alike.setdefault((id(lane.data), lane.batch), []).append(lane)
    parts: list[list[Lane]] = [[]]
    for members in alike.values():
        for start in range(0, len(members), size):
            piece = members[start : start + size]
            if len(parts[-1]) + len(piece) > size:
                parts.append([])
            parts[-1] += piece
    return parts


@dataclass(eq=False)
class Lane:
    """One row in training: an episode, a probe or a uniform run.

    Attributes:
        task: what is trained.
        row: where its adapters lie.
        step: optimizer steps done.
        until: train up to this step.
        rate: the learning rate of each step.
        meter: takes in gradients.
        rows: use the first rows of each batch alone.
        failed: whether a loss was not finite.
        losses: of the steps.
        alignments: of the steps, where they are wanted; see `StackedAdapters.alignments`.
    """

    task: ProxyTask
    row: int
    step: int
    until: int
    rate: Callable[[int], float]
    meter: StackedMeter | None
    rows: int | None = None
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    alignments: list[float] | None = None
    data: TaskData = field(init=False)

    def __post_init__(self) -> None:
        self.data = load_task(self.task)  # held here: more tasks can be in training than the cache of tasks holds

    @property
    def batch(self) -> int:
        """Number of the next batch; a probe may be longer than its task."""
        return self.step % self.task.steps


class FrozenStates:
    """Hidden states of the batches of some steps below the lowest adapters of all runs of a task, which share them.

    They are computed for many steps at a time.

    Args:
        blocks: of the model.
        batches: token ids of steps that follow one another, int64 (steps, rows, length).
        wanted: the blocks.
        first: number of the first step.
    """

    def __init__(self, blocks: Blocks, batches: torch.Tensor, wanted: Sequence[int], first: int = 0) -> None:
        self._blocks, self._batches, self._wanted, self._first = blocks, batches, sorted(set(wanted)), first
        self._start, self._end = 0, 0
        self._states: States = {}

    def at(self, step: int) -> States:
        """Those of one step, (rows, length, width) by block."""
        place = step - self._first
        if not self._start <= place < self._end:
            part = self._batches[place : place + max(1, FORWARD_TOKENS // self._batches[0].numel())]
            states = self._blocks.frozen(part.flatten(0, 1), self._wanted)
            self._states = {block: torch.unflatten(each, 0, part.shape[:2]) for block, each in states.items()}
            self._start, self._end = place, place + len(part)
        return {block: each[place - self._start] for block, each in self._states.items()}


def joining(entries: Sequence[int], states: Sequence[torch.Tensor]) -> States:
    """The states with which runs join a batch.

    Args:
        entries: the block at which each run joins, in rising order.
        states: of each run, (rows, length, width).
    """
    parts: dict[int, list[torch.Tensor]] = {}
    for block, own in zip(entries, states, strict=True):
        parts.setdefault(block, []).append(own)
    return {block: torch.cat(each) for block, each in parts.items()}


class StackTrainer:
    """Trains and evaluates runs of tasks on one base.

    Args:
        base: name of the proxy base.
        runs: how many have room.
        device: where to train.

    Attributes:
        adapters: of the runs.
    """

    def __init__(self, base: str, runs: int, *, device: torch.device) -> None:
        targets = adapted_base(base)[1]
        model = load_base_model(base).to(device)
        model.config.use_cache = False  # nothing is generated
        self.adapters: StackedAdapters = StackedAdapters(model, targets, runs)
        self._blocks = Blocks(model, targets)
        self._device = device

    # Training ---------------------------------------------------------------------------------------------------------

    def train(self, lanes: Sequence[Lane]) -> None:
        """Train each lane to its end; one that meets a loss that is not finite stops there."""
        if not lanes:
            return
        entries = self._blocks.entries(self.adapters.ranks)  # ranks stay as they are here
        states = self._states_of(lanes, entries)
        tokens = lanes[0].data.inputs[0, : lanes[0].rows].numel()
        size = max(1, CACHED_TOKENS // tokens) if self._device.type == "cpu" else len(lanes)

        def losses_of(active: Sequence[Lane]) -> dict[Lane, float]:
            losses: dict[Lane, float] = {}
            for part in parts_of(active, size):
                part.sort(key=lambda lane: entries[lane.row])
                losses |= self._joined_losses(part, entries, states)
            return losses

        self._train(lanes, losses_of)

    def _train(self, lanes: Sequence[Lane], losses_of: Callable[[Sequence[Lane]], dict[Lane, float]]) -> None:
        while active := [lane for lane in lanes if lane.step < lane.until and not lane.failed]:
            losses = losses_of(active)
            for lane in active:
                lane.losses.append(losses[lane])
                lane.failed = not math.isfinite(losses[lane])
            self._step([lane for lane in active if not lane.failed])

    def _states_of(self, lanes: Sequence[Lane], entries: Sequence[int]) -> dict[Lane, FrozenStates]:
        """What each lane joins the batch with; lanes with the same batches share it."""
        alike: dict[tuple[Any, ...], list[Lane]] = {}
        for lane in lanes:
            alike.setdefault((lane.task, lane.step, lane.until, lane.rows), []).append(lane)
        states: dict[Lane, FrozenStates] = {}
        for members in alike.values():
            first = members[0]
            numbers = [step % first.task.steps for step in range(first.step, first.until)]
            batches = first.data.inputs[numbers, : first.rows].to(self._device)
            shared = FrozenStates(self._blocks, batches, [entries[lane.row] for lane in members], first.step)
            states |= dict.fromkeys(members, shared)
        return states

    def _joined_losses(
        self, part: Sequence[Lane], entries: Sequence[int], states: Mapping[Lane, FrozenStates]
    ) -> dict[Lane, float]:
        """Losses and gradients of the next batches of some lanes, in the order of their entries."""
        order = [entries[lane.row] for lane in part]
        joined = joining(order, [states[lane].at(lane.step)[entry] for lane, entry in zip(part, order, strict=True)])
        with self.adapters.running([lane.row for lane in part], order) as model:
            with self._blocks.joined(joined) as tokens:
                logits = model(input_ids=tokens).logits
            losses = self._losses(logits, part)
            self.adapters.backward(losses)
        return dict(zip(part, losses.tolist(), strict=True))

    def _losses(self, logits: torch.Tensor, lanes: Sequence[Lane]) -> torch.Tensor:
        """The loss of each lane, (lanes,), from their answers, one after another."""
        losses, start, rows = [], 0, len(logits) // len(lanes)
        for _, neighbours in groupby(lanes, lambda lane: (id(lane.data), lane.batch)):
            alike = list(neighbours)
            end, lane = start + rows * len(alike), alike[0]
            losses.append(lane.data.train_losses_of(logits[start:end], lane.batch, lane.rows, len(alike)))
            start = end
        return torch.cat(losses)

    def _step(self, lanes: Sequence[Lane]) -> None:
        """Clip, take in signals and step."""
        if not lanes:
            return
        lanes = sorted(lanes, key=lambda lane: lane.row)  # an index of all rows in order makes no copy
        rows = [lane.row for lane in lanes]
        squares = self.adapters.clip(rows, MAX_GRAD_NORM)
        metered = [index for index, lane in enumerate(lanes) if lane.meter]
        accumulate_all([lane.meter for lane in lanes if lane.meter], squares[metered])
        watched = [lane for lane in lanes if lane.alignments is not None]
        if watched:
            cosines = self.adapters.alignments([lane.row for lane in watched]).tolist()
            for lane, cosine in zip(watched, cosines, strict=True):
                lane.alignments.append(cosine)  # type: ignore[union-attr]
        self.adapters.step(rows, [lane.rate(lane.step) for lane in lanes])
        for lane in lanes:
            lane.step += 1

    # Evaluation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, tasks: Mapping[int, ProxyTask]) -> list[float]:
        """Held-out loss of each of these rows, in nats."""
        entries = self._blocks.entries(self.adapters.ranks)
        losses: dict[int, float] = {}
        for task in dict.fromkeys(tasks.values()):
            rows = sorted((row for row, own in tasks.items() if own == task), key=lambda row: entries[row])
            losses |= dict(zip(rows, self._held_out(task, rows, [entries[row] for row in rows]), strict=True))
        return [losses[row] for row in tasks]

    def _held_out(self, task: ProxyTask, rows: Sequence[int], order: Sequence[int]) -> list[float]:
        """The same of runs of one task, in the order of their entries."""
        data, runs = load_task(task), len(rows)
        states = self._blocks.frozen(data.held_out_inputs.to(self._device), sorted(set(order)))
        size = max(1, FORWARD_TOKENS // (runs * task.length))
        terms = []
        with self.adapters.running(rows, order) as model:
            for start in range(0, task.eval_rows, size):
                joined = joining(order, [states[entry][start : start + size] for entry in order])
                with self._blocks.joined(joined) as tokens:
                    terms.append(data.held_out_terms(model(input_ids=tokens).logits, start, runs))
        return [data.mean_of(own) for own in torch.cat(terms, dim=1)]


@dataclass(eq=False)
class StackedEpisode:
    """One episode under way.

    Attributes:
        task: what is fine-tuned.
        applier: its link to decisions.
        observation: what the next decision is made from; at the end what the last one was made from.
        log: where its decisions are written down, if anywhere.
        ranks: after the latest decision, int64 (modules,).
        step: optimizer steps done.
        loss: mean training loss of the latest interval; None before the first one, and where it was not finite.
        failed: whether a loss was not finite.
    """

    task: ProxyTask
    applier: PlanApplier[StackedRun]
    observation: Observation
    ranks: IntArray
    log: EpisodeLog | None = None
    step: int = 0
    loss: float | None = None
    failed: bool = False

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
        device: where to train.

    Attributes:
        under_way: the latest episode of each slot, also when it has ended.

    All tasks must have the same batch size and length. A task's results do not depend on what runs beside it.
    """

    base: str
    schedule: DecisionSchedule

    def __init__(
        self, base: str, schedule: DecisionSchedule, slots: int, *, device: torch.device | str = "cpu"
    ) -> None:
        self.base, self.schedule = base, schedule
        self.device: torch.device = torch.device(device)
        self.under_way: dict[int, StackedEpisode] = {}
        self._targets = adapted_base(base)[1]
        self._trainer = StackTrainer(base, slots, device=self.device)
        self._adapters = self._trainer.adapters
        self._base_norms = base_norms(self._targets)
        # Under which results are known of a task; those of a PEFT model differ from them in their last bits.
        self._probe_key = ("stacked probe", schedule, str(device))
        self._reference_key = ("stacked reference", str(device))
        self._shape: tuple[int, int] | None = None

    @property
    def module_count(self) -> int:
        """Target modules of the base."""
        return len(self._targets)

    def start(self, tasks: Mapping[int, ProxyTask], logs: Mapping[int, EpisodeLog] | None = None) -> None:
        """Begin episodes; a slot's last one is forgotten.

        Args:
            tasks: by slot.
            logs: where the decisions of some of them are written down, by slot.

        Raises:
            ConfigError: a task is of another base, or its batches have another shape than those of the other tasks.
        """
        rows = self._rows_for(tasks)
        self._probe({task: row for task, row in rows.items() if self._probe_key not in known_of(task)})
        reset_runs(self._adapters, {slot: task.seed for slot, task in tasks.items()})
        for slot, task in tasks.items():
            run = StackedRun(self._adapters, slot, self._base_norms)
            applier = new_applier(ProxyFineTune(task), run, self.schedule, known_of(task)[self._probe_key])
            log = logs.get(slot) if logs else None
            seen = applier.observe(0)
            self.under_way[slot] = StackedEpisode(task, applier, seen, seen.problem.ranks, log)

    def start_all(self, tasks: Sequence[ProxyTask], logs: Mapping[int, EpisodeLog] | None = None) -> None:
        """Begin episodes in the first slots, and forget all others; see `start`."""
        self.under_way.clear()
        self.start(dict(enumerate(tasks)), logs)

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

    def reference(self, task: ProxyTask) -> Reference:
        """What fixed allocations of a task achieve that knows it, or that was given to `measure_references`."""
        return task.reference or known_of(task)[self._reference_key]

    def problem(self, task: ProxyTask) -> AllocationProblem:
        """The plans that a task's first decision allows."""
        self._checked(task)
        return first_problem(task)

    # Decisions --------------------------------------------------------------------------------------------------------

    def step(self, decisions: Mapping[int, Decision]) -> None:
        """Take decisions, and train these episodes until the next one or their end.

        A loss that is not finite ends an episode.

        Args:
            decisions: by slot, of episodes that have not ended.
        """
        episodes = {slot: self.under_way[slot] for slot in decisions}
        for slot, episode in episodes.items():
            plan = episode.applier.apply(decisions[slot], episode.step)
            episode.ranks = plan.ranks
            if episode.log:
                episode.log.append(
                    episode.applier,
                    episode.observation,
                    decisions[slot],
                    plan,
                    step=episode.step,
                    loss=episode.loss,
                )
        runs = {slot: episode.applier.adapters for slot, episode in episodes.items()}
        set_stacked_ranks(self._adapters, [run.move for run in runs.values() if run.move])
        lanes = {}
        for slot, episode in episodes.items():
            runs[slot].move = None
            meter = None if episode.applier.finished else runs[slot].meter
            until = episode.applier.until
            lanes[slot] = Lane(episode.task, slot, episode.step, until, _decay(episode.task), meter)
        self._trainer.train(list(lanes.values()))
        for slot, lane in lanes.items():
            episode = episodes[slot]
            episode.step, episode.failed = lane.step, lane.failed
            episode.loss = None if lane.failed else float(np.mean(lane.losses))
            if not episode.ended:
                episode.observation = episode.applier.observe(episode.step, episode.loss)

    def run_to_the_end(
        self,
        decide: Callable[[list[Observation]], Sequence[Decision]],
        note: Callable[[list[Observation], list[int]], None] | None = None,
    ) -> list[float]:
        """Take decisions until all episodes under way are over.

        Args:
            decide: makes a decision for each slot from what is seen there, in the order of `under_way`; those for
                episodes that have failed are ignored.
            note: called after each step with what was seen before it, and the places of the episodes that went on.

        Returns:
            Held-out losses in nats, NaN for episodes that failed.
        """
        slots, episodes = list(self.under_way), list(self.under_way.values())
        while active := [place for place, episode in enumerate(episodes) if not episode.ended]:
            seen = [episode.observation for episode in episodes]
            chosen = decide(seen)
            self.step({slots[place]: chosen[place] for place in active})
            if note:
                note(seen, active)
        losses = self.held_out_losses([slot for slot in slots if not self.under_way[slot].failed])
        return [losses.get(slot, math.nan) for slot in slots]

    def held_out_losses(self, slots: Sequence[int]) -> dict[int, float]:
        """Losses on the held-out sets, now, in nats."""
        tasks = {slot: self.under_way[slot].task for slot in slots}
        return dict(zip(slots, self._trainer.held_out(tasks), strict=True))

    # Before an episode ------------------------------------------------------------------------------------------------

    def _probe(self, tasks: Mapping[ProxyTask, int]) -> None:
        """Probe tasks that are new, each in a free row."""
        if not tasks:
            return
        reset_runs(self._adapters, {row: task.seed for task, row in tasks.items()}, scaled_as=REFERENCE_RANK)
        lanes = []
        for task, row in tasks.items():
            rows = min(self.schedule.probe_batch, task.batch_size)
            meter = StackedMeter(self._adapters, row, self._base_norms)
            lanes.append(Lane(task, row, 0, self.schedule.probe_steps, _constant(task), meter, rows))
        self._trainer.train(lanes)
        for lane in lanes:
            assert lane.meter is not None
            known_of(lane.task)[self._probe_key] = (
                unknown_signals(self.module_count) if lane.failed else ProbeResult.of(lane.meter.read(), lane.losses)
            )

    def measure_references(self, tasks: Mapping[int, ProxyTask]) -> None:
        """Run the uniform plan of tasks that do not know its result; a slot's last episode is forgotten.

        Args:
            tasks: by slot.

        Raises:
            ConfigError: see `start`.
        """
        rows = {task: row for task, row in self._rows_for(tasks).items() if task.reference is None}
        unknown = {row: task for task, row in rows.items() if self._reference_key not in known_of(task)}
        if not unknown:
            return
        reset_runs(self._adapters, {row: task.seed for row, task in unknown.items()})
        initial = self._trainer.held_out(unknown)
        final = self.run_fixed({row: (task, uniform_ranks(self.problem(task))) for row, task in unknown.items()})
        for task, before, after in zip(unknown.values(), initial, final, strict=True):
            known_of(task)[self._reference_key] = Reference(before, after if np.isfinite(after) else before)

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


def _decay(task: ProxyTask) -> Callable[[int], float]:
    return lambda step: rate_at(task.learning_rate, step, task.steps)


def _constant(task: ProxyTask) -> Callable[[int], float]:
    return lambda step: task.learning_rate


DIGEST_BASES = ("llama-4x32", "bert-4x32")
DIGEST_SIZES: dict[str, Any] = {"corpus": "documentation", "budget": 0.5, "steps": 12, "length": 16, "eval_rows": 16}
"""The proxies, and the sizes of the tasks, of `rounding_digest`."""


def rounding_digest() -> str:
    """Run two short stacks of episodes under a rule, whose last bits tell how a machine rounds; takes about a second.

    Returns:
        A digest of all losses and of the last observations, and the versions that may explain another one. It is equal
        on machines that train policies to the same bits.
    """
    digest = sha256()
    for base in DIGEST_BASES:
        tasks = [ProxyTask("planted", seed, base, **DIGEST_SIZES) for seed in (1, 2)]
        episodes = StackedEpisodes(base, DecisionSchedule(probe_steps=2), len(tasks))
        episodes.start_all(tasks)
        losses = episodes.run_to_the_end(lambda seen: [RULES["signal-mean"].decide(each) for each in seen])
        digest.update(repr(losses).encode())
        for episode in episodes.under_way.values():
            digest.update(episode.observation.modules.tobytes())
    return f"{digest.hexdigest()[:12]} with torch {torch.__version__} and rankpilot {version('rankpilot')}"
