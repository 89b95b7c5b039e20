"""What workers keep while a policy is trained: stacks of episodes, one decision at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.arrays import Arrays, FloatArray
from ...env.episodes.rollout import Rollout
from ...env.episodes.slots import StackedConfig, StackedRankAllocation
from ...env.episodes.stacked import StackedEpisodes
from ...env.spaces import read_action
from ...env.tasks.oracle import utilities
from ...env.tasks.proxy_task import ProxyTask


@dataclass(frozen=True, eq=False)
class StackStep:
    """What a stack has come to after a decision.

    Attributes:
        arrays: the observations, one row an episode.
        rewards: of the episodes that have ended with this decision, 0 for others, float64 (episodes,).
        infos: of each episode; see `RankAllocationEnv`.
    """

    arrays: Arrays
    rewards: NDArray[np.float64]
    infos: tuple[dict[str, Any], ...]


class EnvironmentStack:
    """The registered environment, stacked, on tasks that are given; episodes that have ended wait for all others.

    Args:
        config: of the stacks; their base is that of the tasks.
    """

    def __init__(self, config: StackedConfig) -> None:
        self._config = config
        self._stacks: dict[str, StackedRankAllocation] = {}
        self._active: dict[int, bool] = {}
        self._infos: dict[int, dict[str, Any]] = {}

    def begin(self, tasks: Sequence[ProxyTask]) -> Arrays:
        """Start all episodes; returns what they see.

        Args:
            tasks: on one base, one a group.
        """
        base, size = tasks[0].base, self._config.episodes_per_task
        if base not in self._stacks:
            self._stacks[base] = StackedRankAllocation(replace(self._config, base=base))
        self._stack = self._stacks[base]
        slots = range(self._config.num_envs)
        self._stack.start({slot: tasks[slot // size] for slot in slots})
        self._active = dict.fromkeys(slots, True)
        return self._stack.padded(slots)

    def step(self, actions: NDArray[Any]) -> StackStep:
        """Take decisions, (episodes, action size)."""
        transitions = self._stack.step({slot: actions[slot] for slot, active in self._active.items() if active})
        self._active |= {slot: not each.terminated for slot, each in transitions.items()}
        rewards = [transitions[slot].reward if slot in transitions else 0.0 for slot in self._active]
        self._infos |= {slot: each.info for slot, each in transitions.items()}
        infos = tuple(self._infos[slot] for slot in self._active)
        return StackStep(self._stack.padded(list(self._active)), np.array(rewards), infos)


@dataclass(frozen=True, eq=False)
class RolloutState:
    """What a rollout of whole tasks has come to.

    Attributes:
        arrays: the observations, one row an episode.
        losses: held-out losses at the end, in nats; NaN for failed runs.
        worth: at the beginning, what each module is worth at most, in nats, (modules,) by episode; None if not known.
    """

    arrays: Arrays
    losses: tuple[float, ...] = ()
    worth: tuple[FloatArray | None, ...] = ()


class RolloutStack:
    """Rollouts of any tasks.

    Args:
        config: of the stacks; their base is that of the tasks.
    """

    def __init__(self, config: StackedConfig) -> None:
        self._config = config
        self._episodes: dict[str, StackedEpisodes] = {}

    def begin(self, tasks: Sequence[ProxyTask], with_worth: bool) -> RolloutState:
        """Start tasks.

        Args:
            tasks: on one base.
            with_worth: tell what modules are worth on planted tasks.
        """
        base, config = tasks[0].base, self._config
        if base not in self._episodes:
            self._episodes[base] = StackedEpisodes(base, config.schedule, config.rows, device=config.device)
        self._running = Rollout(self._episodes[base], tasks)
        pairs = zip(tasks, self._running.seen, strict=True) if with_worth else ()
        worth = (utilities(task, o.problem)[:, -1] if task.kind == "planted" else None for task, o in pairs)
        return RolloutState(self._arrays(), worth=tuple(worth))

    def step(self, actions: NDArray[Any]) -> RolloutState:
        """Take decisions, (episodes, action size)."""
        config, seen = self._config, self._running.seen
        assert config.max_modules is not None
        self._running.step(
            [
                read_action(config.actions, action, config.max_modules, observation)
                for action, observation in zip(actions, seen, strict=True)
            ]
        )
        return RolloutState(self._arrays(), tuple(self._running.losses()) if self._running.ended else ())

    def _arrays(self) -> Arrays:
        assert self._config.max_modules is not None
        rows = [observation.padded(self._config.max_modules) for observation in self._running.seen]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
