"""The plans that are worth their cost, before training: no other plan costs less and is expected to lose as little.

Losses are relative to plain LoRA, rank 8 on every target module, of the same data and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import ConfigError
from .deliberation import Deliberation
from .goal import CAUTION, improvement_of


@dataclass(frozen=True, eq=False)
class FrontierPlan:
    """A plan on the frontier.

    Attributes:
        name: of the candidate that leads to it.
        ranks: int64 (modules,).
        cost: what it takes, in the unit of the budget.
        seconds: of a step; None where they are not known.
        loss: expected loss over that of plain LoRA: 1.02 is 2 % more.
        low: lower end of the interval of `loss`: as far from the mean vote as a decision doubts it; see
            `Deliberation.reach`.
        high: upper end.
        fits: whether it is within the budget; of plain LoRA alone it may be false.
        taken: whether the decision is this plan.
        narrow: whether a goal of cost may not take it, see `broad_plans`.
    """

    name: str
    ranks: IntArray
    cost: float
    seconds: float | None
    loss: float
    low: float
    high: float
    fits: bool
    taken: bool
    narrow: bool = False

    @property
    def verdict(self) -> str:
        """Beside plain LoRA, "better", "worse", or "tie" where the interval does not tell them apart."""
        return "worse" if self.low > 1 else "better" if self.high < 1 else "tie"


def frontier(found: Deliberation) -> list[FrontierPlan]:
    """The frontier of a decision, the cheapest plan first; with plain LoRA and the plan taken wherever they lie.

    What counts as cost is time under the goal "time", and else what the budget counts.

    Args:
        found: of a policy whose networks tell plans of any cost apart, at a run's first decision.

    Raises:
        ConfigError: the deliberation holds no plans of other costs.
    """
    if found.plain is None or found.costs is None:
        raise ConfigError("This decision weighed plans of one cost alone, so there is no frontier.")
    costs = found.seconds if found.goal.kind == "time" and found.seconds is not None else found.costs
    votes = found.votes - found.votes[:, [found.plain]]
    mean, others = votes.mean(axis=0), np.arange(len(found.plans)) != found.plain
    caution = found.lcb_coefficient if found.goal.saves else CAUTION
    reach = caution * votes.std(axis=0) + found.doubt * others
    shown = {*_undominated(costs, mean, found.may_take), found.plain, found.plan}
    return [
        _plan(found, plan, *(float(value) for value in (mean[plan], reach[plan])))
        for plan in sorted(shown, key=lambda plan: (costs[plan], -mean[plan]))
    ]


def _plan(found: Deliberation, plan: int, mean: float, reach: float) -> FrontierPlan:
    assert found.costs is not None
    loss, low, high = (math.exp(-improvement_of(vote)) for vote in (mean, mean + reach, mean - reach))
    return FrontierPlan(
        name=found.candidates[int(np.argmax(found.plan_of == plan))],
        ranks=found.plans[plan],
        cost=float(found.costs[plan]),
        seconds=None if found.seconds is None else float(found.seconds[plan]),
        loss=loss,
        low=low,
        high=high,
        fits=bool(found.may_take[plan]),
        narrow=found.goal.saves and bool(found.narrow[plan]),
        taken=plan == found.plan,
    )


def _undominated(costs: FloatArray, mean: FloatArray, allowed: BoolArray) -> Iterator[int]:
    """The plans that are better than all that cost less or as much."""
    best = -np.inf
    for plan in np.lexsort((-mean, costs)).tolist():
        if allowed[plan] and mean[plan] > best:
            best = float(mean[plan])
            yield plan
