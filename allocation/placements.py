"""Plans that read no signal: one rank, or nearly one, on the top layers.

Without gradient checkpointing, adapting the top layers at a useful rank was better than any other plan with the same
bytes (docs/design.md). One rank on all modules is `rankpilot.allocation.plan.uniform_ranks`.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError
from .plan import pack, project
from .problem import AllocationProblem

RANK_FLOOR = 16.0
"""The rank floor. On the models on which it was measured, it is about a quarter of their width."""


def top_layers(problem: AllocationProblem, layers: int, rank: int) -> IntArray:
    """One rank on all modules of the top layers, within their bounds, int64 (modules,); the budget plays no part.

    Args:
        problem: the modules and their bounds.
        layers: the number of layers, 0 or more.
        rank: any rank of at least 0; a module that cannot have it gets the most that it can.

    Raises:
        ConfigError: the model has fewer layers, or a number is negative.
    """
    numbers = np.unique(problem.blocks)
    if not 0 <= layers <= len(numbers) or rank < 0:
        raise ConfigError(f"layers lies from 0 to {len(numbers)} and rank is at least 0; got {layers} and {rank}.")
    lowest = numbers[len(numbers) - layers] if layers else numbers[-1] + 1
    return problem.uniform(rank, int(lowest))


def top_down_whole(problem: AllocationProblem, rank_floor: float = RANK_FLOOR) -> IntArray:
    """One rank on whole layers from the top down: as many layers as can have the rank floor, at the largest rank.

    Where the top layer cannot have the rank floor, it alone gets the largest rank that fits; where it cannot have rank
    1, the plan is that of `pack`.

    Args:
        problem: the plans that are possible; `max_step` and `pinned` are ignored.
        rank_floor: the rank that every adapted module should be able to have, > 0.

    Returns:
        Whole ranks, on the ladder or not, int64 (modules,).
    """
    least = max(1, round(rank_floor))
    counts = range(1, len(np.unique(problem.blocks)) + 1)
    layers = max(1, bisect_left(counts, True, key=lambda k: not problem.fits(top_layers(problem, k, least))))
    ranks = range(1, problem.ladder.ranks[-1] + 1)
    rank = bisect_left(ranks, True, key=lambda r: not problem.fits(top_layers(problem, layers, r)))
    if rank == 0:
        return pack(problem.fresh(), np.zeros(len(problem.ranks)), rank_floor=1.0)
    return top_layers(problem, layers, rank)


def top_down(problem: AllocationProblem, rank_floor: float = RANK_FLOOR) -> IntArray:
    """As `top_down_whole`, but with some modules of the next layer down as well, and nothing left unspent.

    Args:
        problem: the plans that are possible; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.
        rank_floor: the rank that every adapted module should be able to have, > 0.

    Returns:
        Ranks on the ladder, int64 (modules,), of which none can rise further.
    """
    fresh = problem.fresh()
    scores = np.zeros(len(problem.ranks))
    return project(fresh, pack(fresh, scores, rank_floor), scores).ranks
