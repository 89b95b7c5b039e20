"""Competitors that know more than an observation tells: the task itself, or how several runs of it ended.

None of them is a policy to use; they bound what one could reach.

| rule | what it is allowed |
|---|---|
| uniform-115 | uniform rank with 15 % more budget |
| oracle | to know what was planted, and where |
| best-window | to run each of several windows of layers, and to keep the best run |
| best-of-8 | to run eight random plans, and to keep the best run |

Each turns a task into attempts: runs of a task by a policy, of which the one with the lowest held-out loss counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from ...allocation.policy import Policy
from ...allocation.problem import AllocationProblem
from ...env.tasks.oracle import oracle_plan
from ...env.tasks.proxy_task import ProxyTask
from ..rules import RULES, FixedPlan, RandomScores, Window

Attempt = tuple[ProxyTask, Policy]


@runtime_checkable
class TaskRule(Protocol):
    """A competitor that sees the task."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def attempts(self) -> int:
        """How many runs one task takes, at most."""

    def prepare(self, task: ProxyTask, problem: AllocationProblem) -> Sequence[Attempt]:
        """What to run; the best of it counts. Nothing if the rule does not apply to the task.

        Args:
            task: with its reference.
            problem: the plans that its first decision allows.
        """


@dataclass(frozen=True)
class LargerBudget:
    """Uniform rank with more budget than everyone else: what better allocation is worth in memory.

    Attributes:
        name: what tables call it.
        factor: on the budget.
        attempts: one.
    """

    name: str = "uniform-115"
    factor: float = 1.15
    attempts: int = 1

    def prepare(self, task: ProxyTask, problem: AllocationProblem) -> Sequence[Attempt]:
        """The same task with a larger budget, and the result of uniform rank with the one that it had."""
        return [(replace(task, budget=self.factor * task.budget), RULES["uniform"])]


@dataclass(frozen=True)
class Oracle:
    """The plan that captures most of what was planted; see `env.oracle`.

    Attributes:
        name: what tables call it.
        attempts: one.
    """

    name: str = "oracle"
    attempts: int = 1

    def prepare(self, task: ProxyTask, problem: AllocationProblem) -> Sequence[Attempt]:
        """Its plan, on planted tasks."""
        if task.kind != "planted":
            return []
        ranks = oracle_plan(task, problem)
        return [(task, FixedPlan(self.name, lambda _: ranks))]


@dataclass(frozen=True)
class BestWindow:
    """The best window of neighbouring layers at one rank, in hindsight.

    Attributes:
        name: what tables call it.
        shares: widths of the windows, in shares of the layers; each is moved up by the first of them.
    """

    name: str = "best-window"
    shares: tuple[float, ...] = (0.25, 0.5, 1.0)

    @property
    def attempts(self) -> int:
        """Windows of all widths."""
        return len(self._windows())

    def _windows(self) -> list[Window]:
        step = self.shares[0]
        starts = [(share, np.arange(0, 1 - share + step / 2, step).tolist()) for share in self.shares]
        return [Window(start, start + share) for share, places in starts for start in places]

    def prepare(self, task: ProxyTask, problem: AllocationProblem) -> Sequence[Attempt]:
        """Each window."""
        return [(task, FixedPlan(self.name, window)) for window in self._windows()]


@dataclass(frozen=True)
class BestOfRandom:
    """The best of some random plans, in hindsight.

    Attributes:
        name: what tables call it.
        attempts: how many plans.
    """

    name: str = "best-of-8"
    attempts: int = 8

    def prepare(self, task: ProxyTask, problem: AllocationProblem) -> Sequence[Attempt]:
        """Each plan."""
        return [(task, RandomScores(self.name, draw)) for draw in range(self.attempts)]


_TASK_RULES: tuple[TaskRule, ...] = (LargerBudget(), Oracle(), BestWindow(), BestOfRandom())
TASK_RULES: dict[str, TaskRule] = {rule.name: rule for rule in _TASK_RULES}
