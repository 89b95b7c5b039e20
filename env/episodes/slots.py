"""The environment's episodes, many at a time on one base: what the vector environments are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import NDArray

from ...allocation.observation import Observation
from ...allocation.policy import Decision
from ...allocation.schedule import DecisionSchedule
from ...errors import ConfigError
from ..episode_record import EpisodeRecord
from ..rank_allocation import check_options, within_budget
from ..reward import GroupMeans
from ..tasks.proxy_task import ProxyTask
from ..tasks.suite_names import SUITES
from ..tasks.suites import find_tasks, task_stream
from .stacked import StackedEpisodes


@dataclass(frozen=True)
class StackedConfig:
    """What is stacked.

    Attributes:
        num_envs: episodes at a time.
        base: the proxy base of all tasks.
        task: a fixed task; None draws one for each group.
        suites: names of the suites to draw from.
        split: of the suites.
        group: so many neighbouring episodes share task, seed and batches, and the group's mean is subtracted from
            their rewards; divides `num_envs`.
        schedule: when ranks are decided.
        task_overrides: fields of `ProxyTask` that each task gets, as pairs.
        max_modules: padding of observations and actions; None for as many as the base has.
        compiled: run the model through torch.compile: faster after a minute or two.
        device: where to train.

    Raises:
        ConfigError: a value out of range.
    """

    num_envs: int
    base: str = "llama-4x64"
    task: ProxyTask | None = None
    suites: tuple[str, ...] = SUITES
    split: str = "train"
    group: int = 1
    schedule: DecisionSchedule = field(default_factory=DecisionSchedule)
    task_overrides: tuple[tuple[str, Any], ...] = ()
    max_modules: int | None = None
    compiled: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.num_envs < 1 or self.group < 1 or self.num_envs % self.group:
            raise ConfigError(f"num_envs is at least 1 and a multiple of group; got {self.num_envs} and {self.group}.")
        if self.task and self.task.base != self.base:
            raise ConfigError(f"The task is on base {self.task.base}, not {self.base}. Give base={self.task.base!r}.")


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
    """Episodes in numbered slots; callers reset those that have ended.

    Args:
        config: what is stacked.
    """

    def __init__(self, config: StackedConfig) -> None:
        self.config = config
        overrides = dict(config.task_overrides)
        self.tasks = (
            (config.task,) if config.task else find_tasks(config.suites, config.split, (config.base,), overrides)
        )
        self.episodes = StackedEpisodes(
            config.base, config.schedule, config.num_envs, compiled=config.compiled, device=torch.device(config.device)
        )
        count = self.episodes.module_count
        self.max_modules = config.max_modules or count
        if self.max_modules < count:
            raise ConfigError(f"max_modules is at least {count} for {config.base}; got {config.max_modules}.")
        self.records: dict[int, EpisodeRecord] = {}
        self._streams: list[Iterator[ProxyTask]] = []
        self.seed(None)

    def seed(self, seed: int | Sequence[int] | None) -> None:
        """Begin the tasks anew: slot i draws what an environment with seed + i would, a group what its first one does.

        Args:
            seed: one for all, or one a slot; None for a random one.
        """
        config = self.config
        if seed is None:
            seed = int(np.random.default_rng().integers(2**31))
        seeds = [seed + slot for slot in range(config.num_envs)] if isinstance(seed, int) else list(seed)
        if len(seeds) != config.num_envs:
            raise ConfigError(f"One seed for each of {config.num_envs} environments is needed; got {len(seeds)}.")
        self._rounds = [0] * config.num_envs  # episodes of a group are compared by their place in its stream
        self._means = GroupMeans()
        self._streams = [
            task_stream(self.tasks, seeding.np_random(seeds[slot - slot % config.group])[0])
            for slot in range(config.num_envs)
        ]

    def reset(self, slots: Sequence[int], options: dict[str, Any] | None = None) -> dict[int, dict[str, Any]]:
        """Start an episode in each of these slots; returns their infos.

        Args:
            slots: which ones.
            options: see `RankAllocationEnv`.
        """
        options = check_options(options)
        tasks: dict[int, ProxyTask] = {}
        for slot in slots:
            task: ProxyTask = options.get("task") or next(self._streams[slot])
            tasks[slot] = within_budget(task, options["budget"]) if "budget" in options else task
            self._rounds[slot] += 1
        self.episodes.measure_references(tasks)
        self.episodes.start(tasks)
        for slot, task in tasks.items():
            controller = self.episodes.under_way[slot].controller
            first = self.episodes.observe(slot)
            reference = self.episodes.reference(task)
            self.records[slot] = EpisodeRecord(task.id, reference, controller, first)
        return {slot: self.records[slot].info(0) for slot in slots}

    def step(self, decisions: Mapping[int, Decision]) -> dict[int, Transition]:
        """Take a decision in each of these slots, and train them until their next one or their end."""
        episodes, under_way = self.episodes, self.episodes.under_way
        for slot, decision in decisions.items():
            episodes.apply(slot, decision)
            self.records[slot].decided(under_way[slot].step)
        slots = list(decisions)
        losses = episodes.advance(slots)
        ended = [slot for slot in slots if under_way[slot].ended]
        final = episodes.held_out_losses([slot for slot in ended if not under_way[slot].failed])
        for slot in ended:
            improvement = self.records[slot].improvement(final.get(slot))
            self._means.add(slot // self.config.group, self._rounds[slot], improvement)
        return {slot: self._transition(slot, losses[slot], final.get(slot)) for slot in slots}

    def _transition(self, slot: int, loss: float | None, held_out: float | None) -> Transition:
        episode, record = self.episodes.under_way[slot], self.records[slot]
        ended, grouped = episode.ended, self.config.group > 1
        mean = self._means.mean(slot // self.config.group, self._rounds[slot]) if ended and grouped else 0.0
        reward, info = record.close_interval(
            episode.step,
            loss,
            ended=ended,
            held_out_loss=held_out,
            observation=None if ended else self.episodes.observe(slot, loss),
            group_mean=mean,
        )
        return Transition(record.observation, reward, ended, info)

    def padded(self, slots: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The latest observations as arrays, one row a slot."""
        rows = [self.records[slot].observation.padded(self.max_modules) for slot in slots]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
