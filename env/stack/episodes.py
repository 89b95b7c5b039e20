"""Episodes of short fine-tunes, stacked: policies observe and act in each as in a real run.

As in a real fine-tune (`finetune/controlled_rate.py`), `PlanApplier` observes and changes ranks, `RunRecord` reads the
steps and moves the rate, and adapters can be restored from a copy. All episodes of a stack decide together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...common.errors import ConfigError
from ...decide.applier import PlanApplier, ProbeResult
from ...decide.log import DecisionLog, DecisionRecord
from ...decide.observation import Observation
from ...decide.plan.rate import RULE
from ...decide.policy import Decision, Policy
from ...decide.rate_control import CHANGES, HALVED, PATIENCE, UNDO, RunRecord
from ...decide.settings import DecisionSchedule
from ...lora.adapters import SIGNALS, base_norms
from ...lora.spec import REFERENCE_RANK
from ..bases import adapted_base
from ..task_data import base_cost, first_limit, known_of
from ..tasks import FineTuneTask
from .adapters import RunCopy
from .runs import StackedMeter, StackedRun, reset_runs, set_stacked_ranks
from .trainer import Member, StackTrainer


@dataclass(eq=False)
class StackedEpisode:
    """One fine-tune in progress.

    Attributes:
        task: the fine-tuning task.
        applier: observes its adapters and changes their ranks.
        record: history of its steps.
        observation: input of the next decision; after the end, input of the last one.
        loss: mean training loss since the last decision; None before the first step.
        failed: True if training diverged: a loss was not finite, and rolling back did not help.
        log: the decision log and the policy to credit; None for no log.
    """

    task: FineTuneTask
    applier: PlanApplier[StackedRun]
    record: RunRecord
    observation: Observation
    loss: float | None = None
    failed: bool = False
    log: tuple[DecisionLog, Policy] | None = None
    copy: RunCopy | None = None

    @property
    def ended(self) -> bool:
        """True if the run is over."""
        return self.record.step >= self.task.steps

    def apply(self, decision: Decision) -> None:
        """Apply a decision and log it."""
        applier, seen, step = self.applier, self.observation, self.record.step
        plan = applier.apply(decision, step)
        if self.log:
            (log, policy), number, run = self.log, applier.clock.taken - 1, self.task.id
            record = DecisionRecord.of(
                applier, seen, decision, plan, policy=policy, number=number, step=step, run=run, loss=self.loss
            )
            log.append(record)


class StackedEpisodes:
    """Episodes of tasks on one base, in numbered slots; a task's results do not depend on the other slots.

    Args:
        base: name of the proxy base of all tasks.
        slots: maximum number of concurrent episodes.
        schedule: steps of the decisions.
        device: device to train on.

    Attributes:
        under_way: the latest episodes, by slot.
    """

    def __init__(self, base: str, slots: int, schedule: DecisionSchedule, *, device: str = "cpu") -> None:
        self.base, self.schedule = base, schedule
        self.under_way: dict[int, StackedEpisode] = {}
        self._targets = adapted_base(base)[1]
        self._trainer = StackTrainer(base, slots, device=torch.device(device))
        self._adapters = self._trainer.adapters
        self._norms = base_norms(self._targets)
        self._plain = np.array([target.scaling_at(REFERENCE_RANK) for target in self._targets])
        self._probed = ("probe", schedule.probe_steps, schedule.probe_batch, device)

    def begin(
        self, tasks: Mapping[int, FineTuneTask], logs: Mapping[int, tuple[DecisionLog, Policy]] | None = None
    ) -> None:
        """Start episodes in some slots, and drop all others.

        Args:
            tasks: tasks by slot.
            logs: decision log and policy to credit, by slot.

        Raises:
            ConfigError: a task is for another base, or batch shapes differ.
        """
        shapes = {(task.batch_size, task.length) for task in tasks.values()}
        if {task.base for task in tasks.values()} != {self.base} or len(shapes) > 1:
            raise ConfigError(f"Stacked tasks must share the base {self.base} and the shape of their batches.")
        self.under_way.clear()
        self._probe({task: slot for slot, task in tasks.items() if self._probed not in known_of(task)})
        reset_runs(self._adapters, {slot: task.seed for slot, task in tasks.items()})
        for slot, task in tasks.items():
            run = StackedRun(self._adapters, slot, self._norms)
            applier = PlanApplier(
                run, base_cost(task.base), first_limit(task), self.schedule, task.steps,
                known_of(task)[self._probed], rows=task.batch_size, seed=task.seed,
            )  # fmt: skip
            log = (logs or {}).get(slot)
            episode = StackedEpisode(task, applier, RunRecord(task.steps), applier.observe(0), log=log)
            self.under_way[slot] = episode

    def _probe(self, tasks: Mapping[FineTuneTask, int]) -> None:
        """Probe new tasks, each in a free row."""
        if not tasks:
            return
        reset_runs(self._adapters, {row: task.seed for task, row in tasks.items()}, scaled_as=REFERENCE_RANK)
        members = []
        for task, row in tasks.items():
            meter = StackedMeter(self._adapters, row, self._norms)
            rate, rows = _constant(task.learning_rate * 2**task.offset), min(self.schedule.probe_batch, task.batch_size)
            members.append(Member(task, row, 0, self.schedule.probe_steps, rate, meter, rows))
        self._trainer.train(members)
        for member in members:
            assert member.meter is not None
            unknown = ProbeResult(np.full((len(self._targets), len(SIGNALS)), np.nan), 1.0)
            found = unknown if member.failed else ProbeResult.of(member.meter.read(), member.losses)
            known_of(member.task)[self._probed] = replace(found, predicted=member.data.predicted)

    @property
    def over(self) -> bool:
        """True if all episodes have ended."""
        return all(episode.ended for episode in self.under_way.values())

    def step(self, decisions: Mapping[int, Decision]) -> None:
        """Apply a decision in each running episode, and train to the next decision or the end.

        Args:
            decisions: decisions by slot.
        """
        episodes = {slot: self.under_way[slot] for slot in decisions if not self.under_way[slot].ended}
        for slot, episode in episodes.items():
            decision = decisions[slot]
            back = decision.change == UNDO and episode.copy is not None and not episode.failed
            if back and episode.copy is not None:
                self._adapters.put_back_run(slot, episode.copy)
            episode.apply(decision)
            if episode.record.losses:
                episode.record.take(decision.change, undone=back)
            if CHANGES[decision.change] >= 0:
                episode.copy = None  # a new one is made below
        self._move(episodes)
        self._train(episodes)
        for episode in episodes.values():
            self._limit_moves(episode)
            if not episode.ended:
                step, record = episode.record.step, episode.record
                rate = episode.task.schedule(step)
                episode.observation = episode.applier.observe(step, episode.loss, record, rate)

    def _move(self, episodes: Mapping[int, StackedEpisode]) -> None:
        """Set the decided ranks, and copy the adapters of changed runs."""
        runs = {slot: episode.applier.adapters for slot, episode in episodes.items()}
        set_stacked_ranks(self._adapters, [run.move for run in runs.values() if run.move])
        for slot, episode in episodes.items():
            runs[slot].move = None
            if episode.copy is None or not np.array_equal(episode.copy.ranks, self._adapters.ranks[slot]):
                episode.copy = self._adapters.copy_run(slot)

    def _limit_moves(self, episode: StackedEpisode) -> None:
        """Set the budget of an episode's next step, and shrink a plan over budget, like the guard of a real run."""
        applier, task, step = episode.applier, episode.task, episode.record.step
        applier.price(applier.cost, first_limit(task) * task.budget_factor(step))
        if not episode.ended and not applier.fits():
            applier.correct(applier.ranks, step)

    def _train(self, episodes: Mapping[int, StackedEpisode]) -> None:
        """Train to the next decisions; a run with a non-finite loss goes back to its copy, at half the rate."""
        shown: dict[int, list[float]] = {slot: [] for slot in episodes}
        left = {slot: episode for slot, episode in episodes.items() if not episode.failed}
        for _ in range(PATIENCE):
            members = {slot: self._lane(slot, episode) for slot, episode in left.items()}
            self._trainer.train(list(members.values()))
            for slot, member in members.items():
                self._read(left[slot].record, member)
                shown[slot] += member.losses[: -1 if member.failed else None]
            left = {slot: left[slot] for slot, member in members.items() if member.failed}
            for slot, episode in left.items():
                assert episode.copy is not None
                self._adapters.put_back_run(slot, episode.copy)
                episode.record.losses, episode.record.alignments = [], []
                episode.record.moved += CHANGES[HALVED]
        for episode in left.values():
            episode.failed = True
        for slot, episode in episodes.items():
            episode.record.step = max(episode.record.step, episode.applier.clock.until)
            episode.loss = float(np.mean(shown[slot])) if shown[slot] else None

    def _lane(self, slot: int, episode: StackedEpisode) -> Member:
        """Training left to do before the next decision."""
        task, record, clock = episode.task, episode.record, episode.applier.clock
        factor = RULE.factor(self._adapters.ranks[slot], self._adapters.scalings[slot], self._plain)
        peak = task.learning_rate * 2 ** (task.offset + record.moved) * factor
        meter = episode.applier.adapters.meter if clock.measures else None
        return Member(task, slot, record.step, clock.until, lambda at: peak * task.schedule(at), meter, alignments=[])

    @staticmethod
    def _read(record: RunRecord, member: Member) -> None:
        """Feed the past steps to a record."""
        assert member.alignments is not None
        first = record.step
        for index, loss in enumerate(member.losses):
            known = index < len(member.alignments) and first + index > 0
            if math.isfinite(loss):
                record.add(loss, member.alignments[index] if known else math.nan)
        record.step = member.step

    def held_out(self) -> dict[int, float]:
        """Current held-out losses in nats, by slot; infinite where training failed."""
        sound = {slot: episode.task for slot, episode in self.under_way.items() if not episode.failed}
        found = dict(zip(sound, self._trainer.held_out(sound), strict=True)) if sound else {}
        return {slot: loss if math.isfinite(loss := found.get(slot, math.inf)) else math.inf for slot in self.under_way}

    def play(self, policies: Mapping[int, Policy]) -> dict[int, float]:
        """Let policies decide until all current episodes have ended; return `held_out`.

        Args:
            policies: policies by slot.
        """
        while not self.over:
            running = {slot: episode for slot, episode in self.under_way.items() if not episode.ended}
            self.step({slot: policies[slot].decide(episode.observation) for slot, episode in running.items()})
        return self.held_out()


def _constant(rate: float) -> Callable[[int], float]:
    return lambda step: rate
