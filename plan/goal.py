"""What a policy aims at: the lowest loss within the budget, or the cheapest plan that loses nothing.

The loss of a plan is measured against plain LoRA, rank 8 on every target module, of the same task, seed and batches. As
a number it is a *vote*, asinh(difference of log losses / 1 %): near 0 it counts per cent, and large differences, which
are a hundred times those on other tasks, count by their logarithm.

A goal of cost takes *broad* plans alone, whose ranks are spread widely enough. Of plans of 49 real fine-tunes, those
above this floor ended more than 1 % above plain LoRA in 27 % (texts) and 19 % (labels), those below it in 84 and 57 %
(docs/experiments.md). Networks that are sure of a plan below are often wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..common.arrays import BoolArray, IntArray
from ..errors import ConfigError
from ..lora.spec import REFERENCE_RANK
from .problem import AllocationProblem

LEAST_MODULES = 1 / 2
"""The share of the modules that are adapted."""

LEAST_LAYERS = 2 / 3
"""The share of the layers in which some module is."""

LEAST_THICK = 1 / 2
"""The share of the adapted modules that have the rank of plain LoRA or more, or the highest that they can have."""


def broad_plans(problem: AllocationProblem, plans: IntArray) -> BoolArray:
    """Which plans lie above the floor, bool (plans,). Plain LoRA does.

    Args:
        problem: tells layers and highest ranks.
        plans: ranks, int64 (plans, modules).
    """
    adapted = plans > 0
    thick = adapted & (plans >= np.minimum(problem.max_ranks, REFERENCE_RANK))
    layers = np.unique(problem.blocks)
    in_layers = np.stack([adapted[:, problem.blocks == layer].any(axis=1) for layer in layers], axis=1)
    counts = adapted.sum(axis=1)
    return np.asarray(
        (counts >= LEAST_MODULES * plans.shape[1])
        & (in_layers.sum(axis=1) >= LEAST_LAYERS * len(layers) - 1e-9)
        & (thick.sum(axis=1) >= LEAST_THICK * counts)
    )


GoalKind = Literal["quality", "time", "bytes"]
GOALS: tuple[GoalKind, ...] = get_args(GoalKind)

TOLERANCE = 0.01
"""The tolerance where none is given, in log loss."""

CAUTION = 2.0
"""Under a goal of cost, the lower bound of a plan is its mean vote less so many standard deviations of the votes, less
the doubt. The cheapest of a hundred plans is one on which networks disagree: with 1, more doubt is needed for the same
share of plans that keep to the tolerance, and less is saved (docs/experiments.md)."""

LOSS_UNIT = 0.01
"""The difference of log losses that counts as one; see the module."""


@dataclass(frozen=True)
class Goal:
    """What a policy aims at.

    Attributes:
        kind: "quality", the lowest loss within the budget; "time" or "bytes", the plan that takes the least time or the
            fewest bytes at the peak of a step, among those whose loss is surely within the tolerance of plain LoRA.
        tolerance: by how much the log loss may be above that of plain LoRA, 0 to 1: 0.01 is 1 % of the loss. It does
            not count under "quality".

    Raises:
        ConfigError: there is no such goal, or the tolerance is out of range.
    """

    kind: GoalKind = "quality"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.kind not in GOALS:
            raise ConfigError(f"goal is one of {', '.join(GOALS)}; got {self.kind!r}.")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance <= 1:
            raise ConfigError(
                "tolerance is how much the log loss may be above that of rank 8 on all modules, from 0 to 1, such as "
                f"0.01 for 1 %; got {self.tolerance!r}."
            )

    @property
    def saves(self) -> bool:
        """Whether it asks for a cheap plan."""
        return self.kind != "quality"

    @property
    def least_vote(self) -> float:
        """The vote of a plan whose loss is at the end of the tolerance."""
        return vote_of(-self.tolerance)

    def __str__(self) -> str:
        """The goal in words."""
        if not self.saves:
            return "the lowest loss within the budget"
        cost = {"time": "least time a step", "bytes": "fewest bytes"}[self.kind]
        return (
            f"the {cost}, with a loss that is surely at most {self.tolerance:.2g} (log) above "
            "that of rank 8 on all modules"
        )


def goal_of(goal: str, tolerance: float | None, *, budget_unit: str | None = None) -> Goal:
    """The goal of a run's options.

    Args:
        goal: "quality", "time" or "bytes".
        tolerance: see `Goal`; 1 % by default.
        budget_unit: what the budget counts; None for either unit.

    Raises:
        ConfigError: there is no such goal, the tolerance is out of range, or an option does not go with the goal.
    """
    found = Goal(goal, TOLERANCE if tolerance is None else tolerance)  # type: ignore[arg-type]
    if tolerance is not None and not found.saves:
        raise ConfigError("tolerance counts under goal='time' or goal='bytes' alone: give one, or leave tolerance out.")
    if found.kind == "bytes" and budget_unit == "parameters":
        raise ConfigError(
            "goal='bytes' does not go with a budget of parameters: give a budget of bytes ('6GiB', '80%')."
        )
    return found


def vote_of(improvement: float) -> float:
    """The vote of a plan whose log loss is lower than plain LoRA's by so much."""
    return math.asinh(improvement / LOSS_UNIT)


def improvement_of(vote: float) -> float:
    """By how much the log loss of a plan with this vote is lower than plain LoRA's."""
    return LOSS_UNIT * math.sinh(vote)
