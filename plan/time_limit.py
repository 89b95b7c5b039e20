"""Keeps the time of a step within its limit, where layers that a plan needs to run again take time as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.arrays import IntArray
from ..cost.cost import TimedCost, UntimedCost
from ..cost.step_time import PARTS, StepTime, exact_unit
from ..errors import BudgetError
from .plan import least_ranks
from .problem import AllocationProblem

CLOSE = 1.01
"""The factor between a time that is refused and one that is kept, below which the search for a plan ends."""

GROWTH = 1.05
"""The factor by which the search goes on at least, while no time is kept."""

CHECKS = 4
"""How often a plan is timed at most, before its predicted time is believed."""

SETTLED = 0.02
"""The error of a predicted time, as a share, that is left alone."""

FewestLayers = Callable[[IntArray], tuple[str, ...]]
"""The layers that must run again under a plan, so that it keeps its limit of bytes."""


@dataclass(eq=False)
class TimeLimit:
    """The limit of the time of a step.

    Attributes:
        time: of a step under any plan.
        seconds: what a step may take, > 0.
        layers: chooses the layers that run again under each plan; None where those that the step was measured with do.
        beside: where the user set no limit, the seconds of plain LoRA, beside which plans are told; no plan reaches
            `seconds` then.
    """

    time: StepTime
    seconds: float
    layers: FewestLayers | None = None
    beside: float | None = None

    def added_to(self, cost: UntimedCost, limit: float) -> TimedCost:
        """A cost with the time of a step as one more moment; without second runs where `layers` chooses them."""
        return self.time.row(() if self.layers else None).added_to(cost, limit, self.seconds)

    def of(self, ranks: IntArray) -> float:
        """The seconds of a step under a plan, int64 (modules,), second runs included."""
        return self.time.seconds(ranks, self.layers(ranks) if self.layers else None)

    def fits(self, ranks: IntArray) -> bool:
        """Whether a step under a plan, second runs included, is within the limit."""
        return self.of(ranks) <= self.seconds

    def choose(self, problem: AllocationProblem, plan: Callable[[AllocationProblem], IntArray]) -> AllocationProblem:
        """A problem whose plan is within the limit, second runs included.

        The problem's own time counts no second runs where `layers` chooses them. If they take the plan above the limit,
        time counts dearer in the problem, until its plan is small enough; then less dear again, as far as it stays so.

        Args:
            problem: with time among its costs.
            plan: makes the plan of a problem, ranks int64 (modules,).

        Returns:
            The problem, with dearer time if that was needed.

        Raises:
            BudgetError: no plan keeps both limits.
        """
        if self.layers is None:
            return problem
        over = self._over(plan(problem))
        if over <= 1:
            return problem
        refused, ended, best = 1.0, np.inf, None
        factor = max(over, CLOSE)
        while ended > CLOSE * refused:
            changed = dearer(problem, factor)
            if not changed.fits(least_ranks(changed)):
                ended = factor
            elif (over := self._over(plan(changed))) > 1:
                refused = factor
            else:
                ended, best = factor, changed
            factor = (refused * ended) ** 0.5 if np.isfinite(ended) else refused * max(over, GROWTH)
        if best is None:
            raise self._impossible(self.of(least_ranks(problem)))
        return best

    def settled(
        self, plan: Callable[[TimeLimit], IntArray], measured: Callable[[IntArray], float], reference: float
    ) -> TimeLimit:
        """The limit with times as they are under the very plans that it leads to.

        A plan that is made for a limit takes what is predicted too low rather than what is predicted too high. So it is
        timed, all times are scaled to agree with that, and the plan is made anew, until prediction and measurement
        agree. Where they never do, since plans change by whole layers, the limit under which they were nearest is kept.

        Args:
            plan: makes the plan under a limit, int64 (modules,); BudgetError if there is none.
            measured: times a step under a plan, as a share of the reference.
            reference: what a step of the reference takes by this limit's times, in seconds.

        Returns:
            A limit of as many seconds, which has a plan.
        """
        limit, best, least = self, self, math.inf
        for _ in range(CHECKS):
            try:
                ranks = plan(limit)
            except BudgetError:
                break
            error = measured(ranks) * reference / limit.of(ranks)
            if abs(math.log(error)) < least:
                best, least = limit, abs(math.log(error))
            if least <= SETTLED:
                break
            limit = replace(limit, time=limit.time.scaled(np.full(len(PARTS), error)))
        return best

    def check(self, problem: AllocationProblem) -> None:
        """Raise BudgetError if the cheapest plan takes more time than the limit, second runs included."""
        seconds = self.of(least_ranks(problem))
        if seconds > self.seconds:
            raise self._impossible(seconds)

    def text(self, ranks: IntArray) -> str:
        """The time of a plan beside its limit, or beside plain LoRA where there is none, for people."""
        seconds = self.of(ranks)
        if self.beside is None:
            return f"a step takes {seconds:.3g} of {self.seconds:.3g} s"
        return f"a step takes {seconds:.3g} s, {seconds / self.beside:.0%} of that with rank 8 on all modules"

    def state(self) -> dict[str, Any]:
        """All that `from_state` needs, as arrays and JSON values."""
        return {"seconds": self.seconds, "beside": self.beside, "time": self.time.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TimeLimit:
        """The limit that `state` described; who chooses `layers` says so again."""
        beside, seconds = state["beside"], float(state["seconds"])
        return cls(StepTime.from_state(state["time"]), seconds, beside=None if beside is None else float(beside))

    def _over(self, ranks: IntArray) -> float:
        return self.of(ranks) / self.seconds

    def _impossible(self, least: float) -> BudgetError:
        return BudgetError(
            f"The time of {self.seconds:.3g} s a step fits no plan within the budget. The smallest adapter takes "
            f"{least:.3g} s, second runs of layers that save bytes included. Raise the time, or the budget, which then "
            "needs fewer second runs."
        )


def dearer(problem: AllocationProblem, factor: float) -> AllocationProblem:
    """The same problem, in which time counts so many times as much.

    Args:
        problem: with the time of a step among its costs.
        factor: above 0.
    """
    cost, exact = problem.cost, exact_unit(problem.limit)
    assert isinstance(cost, TimedCost)
    changed = {name: getattr(cost, name).copy() for name in ("constant", "per_rank", "group_bytes")}
    for array in changed.values():
        array[-1] = np.ceil(array[-1] * factor / exact) * exact
    return replace(problem, cost=replace(cost, **changed, unit_per_second=cost.unit_per_second * factor))


def under_limit(problem: AllocationProblem, limit: float) -> AllocationProblem:
    """The same problem under another limit of bytes or parameters; the time of a step keeps its own limit.

    Args:
        problem: with the time of a step among its costs or without.
        limit: in the unit of its cost, > 0.
    """
    changed = replace(problem, limit=limit)
    return dearer(changed, limit / problem.limit) if isinstance(problem.cost, TimedCost) else changed
