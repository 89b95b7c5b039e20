"""What a learned policy gives at a decision: a score for each module, and the placement: two numbers for the plan."""

from __future__ import annotations

from ..memory.cost import ParameterCost
from .placements import RANK_FLOOR
from .problem import AllocationProblem

SCORE_BOUND = 4.0
"""Scores and the numbers of the placement lie between minus and plus this."""

PLACEMENT = ("rank_floor", "depth_bias")
"""The numbers of the placement: log2 of a factor on the rank floor, and what is added to the depth bias."""

DEPTH_BIAS = 4.0
"""The depth bias under a budget of bytes, before a policy changes it."""


def base_rank_floor(problem: AllocationProblem) -> float:
    """The rank floor before a policy changes it. Under a budget of parameters depth costs nothing, so it is rank 1."""
    return 1.0 if isinstance(problem.cost, ParameterCost) else RANK_FLOOR


def base_depth_bias(problem: AllocationProblem) -> float:
    """The depth bias before a policy changes it. Under a budget of parameters depth costs nothing, so there is none."""
    return 0.0 if isinstance(problem.cost, ParameterCost) else DEPTH_BIAS
