"""The first decision's choice: candidate plans, their expected change in loss, and their costs.

The decision, its log and every explanation read one `Choice`, so they cannot disagree. Log losses are relative to plain
LoRA, rank 8 on every target module, at its own best learning rate: 0.01 means 1 % more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..common.arrays import Arrays, BoolArray, FloatArray, IntArray
from .plan.goal import CAUTION, SURE, Goal
from .plan.worth import FEATURES

PLAIN = "rank 8 on all modules"
"""Description of plain LoRA, the baseline and first plan of every choice. Modules without rank 8 have their highest."""

PLAIN_WITHIN = f"{PLAIN}, as far as bounds allow"
"""Description of plain LoRA clipped to the bounds."""

COST_TIE = 0.01
"""Relative cost difference below which plans are tied under a cost goal."""

MUCH = 0.01
"""Expected extra log loss above which the user gets a hint on how to reduce it."""

MOST_LOG_LOSS = 20.0
"""Loose upper bound on a feature's contribution to a log loss."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One choice between P plans, the first one plain LoRA; L modules, F features.

    Attributes:
        names: descriptions of the plans, (P,).
        plans: ranks, int64 (P, L).
        parts: contribution of each of `worth.FEATURES` to each plan's expected log loss, (P, F).
        spread: standard deviation of the log loss relative to plain LoRA's, (P,); 0 for plain LoRA.
        costs: in the unit of the budget, (P,).
        seconds: time per step in seconds, (P,); None if unknown.
        fits: mask of plans within budget and bounds, bool (P,). True for all plans except possibly plain LoRA.
        goal: goal of the choice.
        taken: index of the chosen plan.
        caveats: differences between the run and the runs behind the expectations, as text.
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
        """Expected log loss of each plan relative to plain LoRA, (P,)."""
        return np.asarray(self.parts.sum(axis=1))

    @cached_property
    def reach(self) -> FloatArray:
        """Bound on the error of `expected`, (P,)."""
        return SURE * self.spread

    @cached_property
    def surely(self) -> FloatArray:
        """Upper bound on each plan's log loss relative to plain LoRA, (P,)."""
        return self.expected + self.reach

    @cached_property
    def cautious(self) -> FloatArray:
        """Log loss used to compare plans under the quality goal, (P,)."""
        return self.expected + CAUTION * self.spread

    @cached_property
    def within_tolerance(self) -> BoolArray:
        """Mask of plans within the limits whose loss is surely within the goal's tolerance, bool (P,)."""
        return self.fits & (self.surely <= self.goal.tolerance)

    @property
    def misses_goal(self) -> bool:
        """True if a cost goal cannot be met."""
        return self.goal.saves and not self.within_tolerance.any()

    @property
    def goal_costs(self) -> FloatArray:
        """Costs minimized by the goal, (P,): time per step for the time goal, else the unit of the budget."""
        return self.seconds if self.goal.kind == "time" and self.seconds is not None else self.costs

    @cached_property
    def best(self) -> int:
        """Index of the plan to choose under the goal.

        Under quality, or if a cost goal cannot be met, it is the plan with the lowest cautious loss; plain LoRA needs
        no caution. With a caveat, only plain LoRA and plans surely within the tolerance are considered, if any of them
        fits. Under a cost goal, it is the cheapest plan within the tolerance; ties go to the lowest expected loss.
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
        """Expectation for the chosen plan, as text; empty under quality if there is no other plan."""
        expected, surely = (percent(float(values[self.taken])) for values in (self.expected, self.surely))
        fits, tolerance = "" if self.fits[0] else ", which does not fit", percent(self.goal.tolerance)
        if self.misses_goal:
            return (
                f"The goal cannot be met: {PLAIN} does not fit the budget or bounds, and no plan that fits is "
                f"very likely to stay within {tolerance} of its loss. A larger budget or tolerance helps."
            )
        if self.taken == 0 and self.goal.saves:
            return f"No cheaper plan is very likely to stay within {tolerance} of the loss of {PLAIN}."
        if self.taken == 0 and self.caveats:
            return f"This run is unlike those behind the expectations, so {PLAIN} is kept."
        if self.taken == 0:
            return f"No plan that fits is clearly better than {PLAIN}." if len(self.plans) > 1 else ""
        return f"Expected versus {PLAIN}{fits}: loss {expected}, very likely at most {surely}."

    @property
    def lacks_room(self) -> bool:
        """True if much is lost because plain LoRA does not fit."""
        return not self.fits[0] and not self.goal.saves and float(self.expected[self.taken]) > MUCH


def percent(log_loss: float) -> str:
    """Format a difference of log losses as a relative change of the loss, such as "+1.2 %"."""
    return f"{100 * math.expm1(log_loss):+z.1f} %"


def read_choice(scalars: Mapping[str, Any] | None, arrays: Arrays, modules: int) -> Choice | None:
    """Read a choice from its part of a decision-log line and the log's arrays; None gives None.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: not one choice between plans for this number of modules.
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
    kept = {name: arrays[name] for name in ("parts", "spread", "costs", "fits")}
    return Choice(
        names=tuple(names), plans=arrays["plans"].astype(np.int64), seconds=arrays.get("seconds"),
        goal=Goal(**scalars["goal"]), taken=taken, caveats=tuple(caveats), **kept,
    )  # fmt: skip
