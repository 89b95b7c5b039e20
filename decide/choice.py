"""What a first decision was chosen from: plans, what each is expected to lose or gain, and what it costs.

The decision, its log and every explanation read one `Choice`, so they cannot disagree. Log losses are beside plain
LoRA, rank 8 on every target module, at its own best learning rate: 0.01 is 1 % more.

The frontier has the plans that are worth their cost: no plan that costs less is expected to lose about as little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..common.arrays import Arrays, BoolArray, FloatArray, IntArray
from ..plan.goal import CAUTION, SURE, Goal
from ..plan.worth import FEATURES

PLAIN = "rank 8 on all modules"
"""Plain LoRA, with which plans are compared, in words; the first plan of every choice. Modules that cannot have rank 8
have their highest."""

PLAIN_WITHIN = f"{PLAIN}, as far as bounds allow"
"""Plain LoRA where it is not within the bounds, in words."""

COST_TIE = 0.01
"""Plans whose costs differ by less, as a share, are tied under a goal of cost."""

LEAST_GAIN = 0.005
"""A plan of the frontier is expected to lose so much less than the cheaper ones."""

MUCH = 0.01
"""A loss that is expected to be higher by so much is worth a word on what helps."""

MOST_LOG_LOSS = 20.0
"""What a feature adds to a log loss is less, by far."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One choice between P plans, of which the first is plain LoRA; L modules, F features.

    Attributes:
        names: of the plans, in words, (P,).
        plans: ranks, int64 (P, L).
        parts: what each of `worth.FEATURES` adds to the expected log loss of each plan, (P, F).
        spread: standard deviation of the log loss beside plain LoRA's, (P,); 0 for plain LoRA.
        costs: in the unit of the budget, (P,).
        seconds: of a step, (P,); None where they are unknown.
        fits: which plans are within budget, time and bounds, bool (P,). Others than plain LoRA always are.
        goal: of the choice.
        taken: number of the plan that is the decision.
        caveats: in what the run is unlike those that expectations were learned from, in words.
    """

    names: tuple[str, ...]
    plans: IntArray
    parts: FloatArray
    spread: FloatArray
    costs: FloatArray
    seconds: FloatArray | None
    fits: BoolArray
    goal: Goal
    taken: int = 0
    caveats: tuple[str, ...] = ()

    @cached_property
    def expected(self) -> FloatArray:
        """The expected log loss of each plan beside plain LoRA's, (P,)."""
        return np.asarray(self.parts.sum(axis=1))

    @cached_property
    def reach(self) -> FloatArray:
        """How far the truth surely lies at most from what is expected, (P,)."""
        return SURE * self.spread

    @cached_property
    def surely(self) -> FloatArray:
        """The log loss beside plain LoRA's that each plan surely keeps, (P,)."""
        return self.expected + self.reach

    @cached_property
    def cautious(self) -> FloatArray:
        """The log loss by which plans are compared under quality, (P,)."""
        return self.expected + CAUTION * self.spread

    @cached_property
    def within_tolerance(self) -> BoolArray:
        """The plans that fit and surely lose no more than the goal tolerates, bool (P,)."""
        return self.fits & (self.surely <= self.goal.tolerance)

    @property
    def misses_goal(self) -> bool:
        """Whether a goal of cost cannot be kept."""
        return self.goal.saves and not self.within_tolerance.any()

    @property
    def goal_costs(self) -> FloatArray:
        """What the goal counts, (P,): the time of a step under goal time, else what the budget counts."""
        return self.seconds if self.goal.kind == "time" and self.seconds is not None else self.costs

    @cached_property
    def best(self) -> int:
        """The plan that the goal asks for.

        Under quality, and where a goal of cost cannot be kept, that is the one whose loss is the lowest with some
        caution, which plain LoRA does not need; where a caveat stands, of plain LoRA and those alone that are surely
        within the tolerance, if any of them fits. Under a goal of cost it is the cheapest within the tolerance, and of
        those that cost the same the one that is expected to lose the least.
        """
        allowed = self.fits
        if not self.goal.saves and self.caveats:
            as_plain = np.array([name in (PLAIN, PLAIN_WITHIN) for name in self.names])
            allowed = self.within_tolerance | (as_plain & self.fits)
            allowed = allowed if allowed.any() else self.fits
        if not self.goal.saves or self.misses_goal:
            return int(np.argmin(np.where(allowed, self.cautious, np.inf)))
        costs = np.where(self.within_tolerance, self.goal_costs, np.inf)
        tied = costs <= (1 + COST_TIE) * costs.min()
        return int(np.argmin(np.where(tied, self.expected, np.inf)))

    def promise(self) -> str:
        """What is expected of the plan that is taken, in words; empty under quality where there is no other plan."""
        expected, surely = (percent(float(values[self.taken])) for values in (self.expected, self.surely))
        fits = "" if self.fits[0] else ", which does not fit"
        if self.misses_goal:
            return (
                f"The goal cannot be kept: {PLAIN} does not fit the budget, time or bounds, and no plan that fits "
                f"surely stays within {percent(self.goal.tolerance)} of its loss. "
                "A larger budget, time or tolerance helps."
            )
        if self.taken == 0:
            if not self.goal.saves:
                if self.caveats:
                    return f"This run is unlike those that expectations come from, so {PLAIN} stays."
                return f"No plan that fits is clearly better than {PLAIN}." if len(self.plans) > 1 else ""
            return f"No cheaper plan surely stays within {percent(self.goal.tolerance)} of the loss of {PLAIN}."
        return f"Expected versus {PLAIN}{fits}: loss {expected}, surely at most {surely}."

    @property
    def lacks_room(self) -> bool:
        """Whether much is lost because plain LoRA does not fit."""
        return not self.fits[0] and not self.goal.saves and float(self.expected[self.taken]) > MUCH


def percent(log_loss: float) -> str:
    """A difference of log losses as a change of the loss, such as "+1.2 %"."""
    return f"{100 * math.expm1(log_loss):+z.1f} %"


def read_choice(scalars: Mapping[str, Any] | None, arrays: Arrays, modules: int) -> Choice | None:
    """A choice from its part of a line of the decision log and of the arrays there; None of None.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: they are not of one choice between plans of so many modules.
    """
    if scalars is None:
        return None
    names, caveats, taken, count = scalars["names"], scalars["caveats"], scalars["taken"], len(scalars["names"])
    if any(type(words) is not list or not all(isinstance(each, str) for each in words) for words in (names, caveats)):
        raise ValueError("names and caveats are no texts")
    if type(taken) is not int or not 0 <= taken < count:
        raise ValueError(f"plan {taken} of {count}")
    kinds: dict[str, tuple[tuple[int, ...], type]] = {
        "plans": ((count, modules), np.uint16),
        "parts": ((count, len(FEATURES)), np.float64),
        "fits": ((count,), np.bool_),
        **dict.fromkeys(("spread", "costs", "seconds"), ((count,), np.float64)),
    }
    for name, (shape, kind) in kinds.items():
        array = arrays.get(name) if name == "seconds" else arrays[name]
        if array is not None and (array.shape != shape or array.dtype != kind or not np.isfinite(array).all()):
            raise ValueError(f"{name} holds no finite numbers of shape {shape} and type {kind.__name__}")
        if name in ("parts", "spread") and np.abs(arrays[name]).max() > MOST_LOG_LOSS:
            raise ValueError(f"{name} holds log losses above {MOST_LOG_LOSS:g}")
    return Choice(
        names=tuple(names),
        plans=arrays["plans"].astype(np.int64),
        seconds=arrays.get("seconds"),
        **{name: arrays[name] for name in ("parts", "spread", "costs", "fits")},
        goal=Goal(**scalars["goal"]),
        taken=taken,
        caveats=tuple(caveats),
    )


@dataclass(frozen=True, eq=False)
class FrontierPlan:
    """A plan on the frontier.

    Attributes:
        name: in words.
        ranks: int64 (modules,).
        cost: what it takes, in the unit of the budget.
        seconds: of a step; None where they are not known.
        loss: expected loss over that of plain LoRA: 1.02 is 2 % more.
        low: lower end of the interval of `loss`.
        high: upper end.
        fits: whether it is within the budget; of plain LoRA alone it may be false.
        taken: whether the decision is this plan.
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

    @property
    def verdict(self) -> str:
        """Beside plain LoRA, "better", "worse", or "tie" where the interval does not tell them apart."""
        return "worse" if self.low > 1 else "better" if self.high < 1 else "tie"


def frontier(found: Choice) -> list[FrontierPlan]:
    """The frontier of a choice, the cheapest plan first; with plain LoRA and the plan taken wherever they lie."""
    shown = {*_undominated(found), 0, found.taken}
    order = sorted(shown, key=lambda plan: (found.goal_costs[plan], found.expected[plan]))
    return [_plan(found, plan) for plan in order]


def _plan(found: Choice, plan: int) -> FrontierPlan:
    expected, reach = float(found.expected[plan]), SURE * float(found.spread[plan])
    return FrontierPlan(
        name=found.names[plan],
        ranks=found.plans[plan],
        cost=float(found.costs[plan]),
        seconds=None if found.seconds is None else float(found.seconds[plan]),
        loss=math.exp(expected),
        low=math.exp(expected - reach),
        high=math.exp(expected + reach),
        fits=bool(found.fits[plan]),
        taken=plan == found.taken,
    )


def _undominated(found: Choice) -> Iterator[int]:
    """The plans that fit and are expected to be better, by `LEAST_GAIN`, than all that cost as much or less."""
    best = np.inf
    for plan in np.lexsort((found.expected, found.goal_costs)).tolist():
        if found.fits[plan] and found.expected[plan] < best - LEAST_GAIN:
            best = float(found.expected[plan])
            yield plan
