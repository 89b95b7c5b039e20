"""A worker that trains stacks of episodes, in a process of its own or in this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...allocation.policy import Policy, decision_from_scores
from ...allocation.schedule import DecisionSchedule
from ...common.arrays import Arrays, FloatArray, IntArray
from ...env.episodes.rollout import Rollout
from ...env.episodes.stacked import StackedEpisodes
from ...env.spaces import read_scores
from ...env.tasks.oracle import utilities
from ...env.tasks.proxy_task import ProxyTask


@dataclass(frozen=True, eq=False)
class StackState:
    """What a worker tells of a stack: before its first decision, and after each.

    Attributes:
        arrays: the observations, one row an episode.
        losses: held-out losses at the end, in nats; NaN for failed runs.
        churn: see `Rollout`.
        rule_losses: those of the rule's episodes, one a group.
        initial_losses: before training, one a group.
        utilities: what each module is worth at most, in nats, (modules,) by episode; None where it is not known.
        ranks: at the end, int64 (modules,) by episode.
    """

    arrays: Arrays
    losses: tuple[float, ...] = ()
    churn: tuple[float, ...] = ()
    rule_losses: tuple[float, ...] = ()
    initial_losses: tuple[float, ...] = ()
    utilities: tuple[FloatArray | None, ...] = ()
    ranks: tuple[IntArray, ...] = ()


class _Worker:
    """Trains stacks; lives in a process of its own, or in this one."""

    def __init__(self, rule: Policy, schedule: DecisionSchedule, slots: int, max_modules: int, device: str) -> None:
        self._rule, self._schedule, self._slots, self._max_modules = rule, schedule, slots, max_modules
        self._device = device
        self._engines: dict[tuple[int, str], StackedEpisodes] = {}
        self._rollouts: dict[int, tuple[Rollout, int]] = {}
        self._initial: dict[int, tuple[float, ...]] = {}

    def begin(
        self, stack: int, tasks: Sequence[ProxyTask], ruled: Sequence[ProxyTask], with_utilities: bool
    ) -> StackState:
        """Start a stack.

        Args:
            stack: its number; several are under way at once, each in an engine of its own.
            tasks: one an episode.
            ruled: what the rule runs beside them.
            with_utilities: tell what modules are worth on planted tasks.
        """
        key = (stack, tasks[0].base)
        if key not in self._engines:
            self._engines[key] = StackedEpisodes(tasks[0].base, self._schedule, self._slots, device=self._device)
        run = Rollout(self._engines[key], [*tasks, *ruled])
        self._rollouts[stack] = run, len(tasks)
        self._initial[stack] = tuple(run.initial_loss(len(tasks) + place) for place in range(len(ruled)))
        worth: tuple[FloatArray | None, ...] = ()
        if with_utilities:
            pairs = zip(tasks, run.seen, strict=False)
            worth = tuple(utilities(t, o.problem)[:, -1] if t.kind == "planted" else None for t, o in pairs)
        return StackState(self._arrays(stack), utilities=worth)

    def step(self, stack: int, actions: NDArray[Any]) -> StackState:
        """Take decisions, (episodes, action size)."""
        run, count = self._rollouts[stack]
        decisions = []
        for slot, observation in enumerate(run.seen):
            if slot < count:
                action = read_scores(actions[slot], self._max_modules, len(observation.modules))
                decisions.append(decision_from_scores(observation, *action))
            else:
                decisions.append(self._rule.decide(observation))
        run.step(decisions)
        if not run.ended:
            return StackState(self._arrays(stack))
        losses = tuple(run.losses())
        return StackState(
            self._arrays(stack),
            losses[:count],
            tuple(run.churn[:count]),
            losses[count:],
            self._initial[stack],
            ranks=tuple(run.ranks[:count]),
        )

    def _arrays(self, stack: int) -> Arrays:
        run, count = self._rollouts[stack]
        rows = [observation.padded(self._max_modules) for observation in run.seen[:count]]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _serve(pipe: Connection, *options: Any) -> None:
    """A worker's process: answer calls until the pipe closes."""
    torch.set_num_threads(1)
    worker = _Worker(*options)
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({stack: getattr(worker, name)(stack, *values) for stack, (name, values) in calls.items()})
        except Exception as error:  # whatever it is, the parent raises it
            pipe.send(error)
