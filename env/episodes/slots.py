"""The environment's episodes, many at a time on one base: what the vector environments are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...allocation.observation import Observation
from ...allocation.schedule import DecisionSchedule
from ...common.given_numbers import is_count
from ...errors import ConfigError, shown
from ..episode_record import EpisodeRecord
from ..reward import GROUP, UNIFORM, Comparison, rule_to_compare_with
from ..spaces import Actions, action_space, read_action
from ..tasks.proxy_task import ProxyTask
from .stacked import StackedEpisodes


@dataclass(frozen=True)
class StackedConfig:
    """What is stacked.

    Attributes:
        num_envs: episodes at a time.
        base: the proxy base of all tasks.
        episodes_per_task: so many neighbouring episodes are a group: they share task, seed and batches, and begin and
            end together; divides `num_envs`.
        actions: "deltas" or "scores"; see `ACTIONS`.
        against: what the reward compares an episode with: "uniform", the name of a rule, whose run of the task is
            trained beside the episodes, or "group".
        schedule: when ranks are decided.
        max_modules: padding of observations and actions; None for as many as the base has.
        compiled: run the model through torch.compile: faster after a minute or two.
        device: where to train.

    Raises:
        ConfigError: a value out of range.
        UnknownNameError: no such form of actions, or no such comparison.
    """

    num_envs: int
    base: str = "llama-4x64"
    episodes_per_task: int = 1
    actions: Actions = "deltas"
    against: str = UNIFORM
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    max_modules: int | None = None
    compiled: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        counts = (self.num_envs, self.episodes_per_task)
        if not all(map(is_count, counts)) or self.num_envs % self.episodes_per_task:
            raise ConfigError(
                f"num_envs is at least 1 and a multiple of episodes_per_task; got {self.num_envs!r} and "
                f"{self.episodes_per_task!r}."
            )
        if self.max_modules is not None and not is_count(self.max_modules):
            raise ConfigError(f"max_modules is a whole number of at least 1, or None; got {shown(self.max_modules)}.")
        action_space(self.actions, 1)
        rule_to_compare_with(self.against)

    @property
    def rows(self) -> int:
        """Runs that are trained at a time: the episodes and, beside each group, the rule's."""
        return self.num_envs + (self.num_envs // self.episodes_per_task if rule_to_compare_with(self.against) else 0)


@dataclass(frozen=True, eq=False)
class Transition:
    """What one episode's step returns.

    Attributes:
        observation: the next one; at the end the last one again.
        reward: see `env.reward`.
        terminated: whether the episode is over.
        info: as `RankAllocationEnv`'s.
    """

    observation: Observation
    reward: float
    terminated: bool
    info: dict[str, Any]


class StackedRankAllocation:
    """Episodes in numbered slots, in groups of one task each; callers start new ones where a group has ended.

    An episode whose training fails waits for the others of its group.

    Args:
        config: what is stacked.
    """

    def __init__(self, config: StackedConfig) -> None:
        self.config = config
        self._rule = rule_to_compare_with(config.against)
        self.episodes: StackedEpisodes = StackedEpisodes(
            config.base,
            config.schedule,
            config.rows,
            compiled=config.compiled,
            device=torch.device(config.device),
        )
        count = self.episodes.module_count
        self.max_modules: int = config.max_modules or count
        if self.max_modules < count:
            raise ConfigError(f"max_modules is at least {count} for {config.base}; got {config.max_modules}.")
        self.records: dict[int, EpisodeRecord] = {}
        self._rule_seen: dict[int, Observation] = {}
        self._initial: dict[int, float] = {}

    def _group(self, slot: int) -> range:
        """The slots that share a task with one."""
        first = slot - slot % self.config.episodes_per_task
        return range(first, first + self.config.episodes_per_task)

    def _rule_slots(self, slots: Iterable[int]) -> list[int]:
        """Where the rule runs the tasks of these slots, each once; nowhere without a rule."""
        return list(dict.fromkeys(map(self._rule_slot, slots))) if self._rule else []

    def _rule_slot(self, slot: int) -> int:
        return self.config.num_envs + slot // self.config.episodes_per_task

    def start(self, tasks: Mapping[int, ProxyTask]) -> dict[int, dict[str, Any]]:
        """Begin episodes, whole groups at a time; returns their infos.

        Args:
            tasks: by slot; the slots of a group get the same one.

        Raises:
            ConfigError: a part of a group, or several tasks in one group; see also `StackedEpisodes.start`.
        """
        for slot, task in tasks.items():
            if any(tasks.get(other) != task for other in self._group(slot)):
                raise ConfigError(f"Slots {self._group(slot)} begin together, on one task.")
        self.episodes.measure_references(tasks)
        ruled = {self._rule_slot(slot): task for slot, task in tasks.items()} if self._rule else {}
        self.episodes.start({**tasks, **ruled})
        for slot, task in tasks.items():
            controller, reference = self.episodes.under_way[slot].controller, self.episodes.reference(task)
            self.records[slot] = EpisodeRecord(task.id, reference, controller, self.episodes.observe(slot))
        self._rule_seen |= {slot: self.episodes.observe(slot) for slot in ruled}
        self._initial |= self.episodes.held_out_losses(list(ruled))
        return {slot: self.records[slot].info() for slot in tasks}

    def step(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Transition]:
        """Take a decision in whole groups, and train their episodes until the next one or the end.

        Args:
            actions: by slot, see `read_action`; those of episodes that wait are ignored.

        Raises:
            ConfigError: an action cannot be read; nothing has happened then.
        """
        under_way, records = self.episodes.under_way, self.records
        decisions = {
            slot: read_action(self.config.actions, action, self.max_modules, records[slot].observation)
            for slot, action in actions.items()
            if not under_way[slot].ended
        }
        for slot in self._rule_slots(actions):
            if self._rule and not under_way[slot].ended:
                decisions[slot] = self._rule.decide(self._rule_seen[slot])
        for slot, decision in decisions.items():
            self.episodes.apply(slot, decision)
            if slot in actions:
                records[slot].decided()
        for slot, loss in self.episodes.advance(list(decisions)).items():
            observation = None if under_way[slot].ended else self.episodes.observe(slot, loss)
            if slot in actions:
                records[slot].close_interval(under_way[slot].step, loss, observation)
            elif observation is not None:
                self._rule_seen[slot] = observation
        return self._transitions(list(actions))

    def _transitions(self, slots: Sequence[int]) -> dict[int, Transition]:
        under_way = self.episodes.under_way
        over = [slot for slot in slots if all(under_way[other].ended for other in self._group(slot))]
        whole = [slot for slot in (*over, *self._rule_slots(over)) if under_way[slot].ended]
        losses = self.episodes.held_out_losses([slot for slot in whole if not under_way[slot].failed])
        transitions = {}
        for slot in slots:
            record = self.records[slot]
            reward = record.end(losses.get(slot), self._comparison(slot, losses)) if slot in over else 0.0
            transitions[slot] = Transition(record.observation, reward, slot in over, record.info())
        return transitions

    def _comparison(self, slot: int, losses: Mapping[int, float]) -> Comparison:
        """What an episode is compared with, given the held-out losses of its group and its rule."""
        reference = self.records[slot].reference
        group = [losses[other] for other in self._group(slot) if math.isfinite(losses.get(other, math.nan))]
        if self._rule:
            ruled = self._rule_slot(slot)
            return Comparison.with_run(losses.get(ruled, math.nan), self._initial[ruled], reference, group)
        if self.config.against == GROUP:
            return Comparison.with_mean(group, reference)
        return Comparison.with_uniform(reference)

    def padded(self, slots: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The latest observations as arrays, one row a slot."""
        rows = [self.records[slot].observation.padded(self.max_modules) for slot in slots]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
