"""Actions in which policies learn: a score for each module, and two numbers that steer the whole plan."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.arrays import FloatArray, IntArray
from ..memory.cost import ParameterCost
from .plan import pack
from .problem import AllocationProblem

SCORE_BOUND = 4.0
"""Scores and steering numbers lie between minus and plus this."""


PLACEMENT = ("rank_floor", "depth_bias")
"""What a policy gives beside the scores: corrections of the rank floor (log2) and of the bias towards upper layers."""


RANK_FLOOR = 16.0
"""Rank that an adapted module should be able to have, before the policy's correction; see `placements.top_down`."""


DEPTH_BIAS = 4.0
"""How much lower a module's score counts than that of one in the next layer up, before the policy's correction."""


def base_rank_floor(problem: AllocationProblem) -> float:
    """The rank floor before a policy's correction: depth costs nothing under a parameter budget."""
    return 1.0 if isinstance(problem.cost, ParameterCost) else RANK_FLOOR


def base_depth_bias(problem: AllocationProblem) -> float:
    """The depth bias before a policy's correction: layers from the top down where depth costs bytes, else none."""
    return 0.0 if isinstance(problem.cost, ParameterCost) else DEPTH_BIAS


def decode(
    problem: AllocationProblem, scores: FloatArray, placement: Sequence[float] | FloatArray
) -> tuple[IntArray, float, float]:
    """The ranks that scores ask for.

    Args:
        problem: the plans that are possible now.
        scores: log rank relative to the other modules, (modules,).
        placement: log2 of the factor on the rank floor, and what is added to the depth bias; see `PLACEMENT`. Under a
            parameter budget depth costs nothing: the floor starts at rank 1 instead of 16, and the depth bias at none.

    Returns:
        Ranks on the ladder, int64 (modules,), the floor as a rank, and the depth bias.
    """
    rank_floor_shift, depth_bias_shift = placement
    rank_floor = float(base_rank_floor(problem) * 2.0**rank_floor_shift)
    depth_bias = float(base_depth_bias(problem) + depth_bias_shift)
    return pack(problem, scores, rank_floor, depth_bias), rank_floor, depth_bias
