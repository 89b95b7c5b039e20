"""Actions in which policies learn: a score for each module, and two numbers that steer the whole plan."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.arrays import FloatArray, IntArray
from ..memory.cost import ParameterCost
from .plan import pack
from .problem import PlanProblem

SCORE_BOUND = 4.0
"""Scores and steering numbers lie between minus and plus this."""


STEERING = ("floor", "tilt")
"""What a policy gives beside the scores: corrections of the rank floor (log2) and of the tilt towards upper layers."""


FLOOR = 16.0
"""Rank that an adapted module should be able to have, before the policy's correction (rule16 of docs/design.md)."""


TILT = 4.0
"""How much lower a module's score counts than that of one in the next layer up, before the policy's correction."""


def base_floor(problem: PlanProblem) -> float:
    """The rank floor before a policy's correction: depth costs nothing under a parameter budget."""
    return 1.0 if isinstance(problem.cost, ParameterCost) else FLOOR


def base_tilt(problem: PlanProblem) -> float:
    """The tilt before a policy's correction: layers from the top down where depth costs bytes, else none."""
    return 0.0 if isinstance(problem.cost, ParameterCost) else TILT


def decode(
    problem: PlanProblem, scores: FloatArray, steering: Sequence[float] | FloatArray
) -> tuple[IntArray, float, float]:
    """Rank deltas that scores ask for.

    Args:
        problem: the plans that are possible now.
        scores: log rank relative to the other modules, (modules,).
        steering: log2 of the factor on the rank floor, and what is added to the tilt; see `STEERING`. Under a parameter
            budget depth costs nothing: the floor starts at rank 1 instead of 16, and the tilt at none.

    Returns:
        Deltas in rungs, int64 (modules,), the floor as a rank, and the tilt.
    """
    floor_shift, tilt_shift = steering
    floor = float(base_floor(problem) * 2.0**floor_shift)
    tilt = float(base_tilt(problem) + tilt_shift)
    target = pack(problem, scores, floor, tilt)
    return problem.ladder.rung(target) - problem.ladder.rung(problem.ranks), floor, tilt
