"""Placement rules: plans that read no signal, to start from and to compare with.

Without gradient checkpointing the top layers at a useful rank beat every other placement that was tried at the same
bytes; see docs/design.md. All-linear at one rank is `rankpilot.allocation.plan.uniform_ranks`.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError
from .plan import pack, project
from .problem import AllocationProblem

RANK_FLOOR = 16.0
"""Rank that an adapted module should be able to have: about a quarter of the width of the models it was found on."""


def top_layers(problem: AllocationProblem, layers: int, rank: int) -> IntArray:
    """One rank on all modules of the top layers, within the bounds and whatever it costs, int64 (modules,).

    Args:
        problem: modules, bounds and ladder.
        layers: how many layers, 0 or more.
        rank: the rank, on the ladder or not; at most what each module can have.

    Raises:
        ConfigError: there are not so many layers, or a number is negative.
    """
    numbers = np.unique(problem.blocks)
    if not 0 <= layers <= len(numbers) or rank < 0:
        raise ConfigError(f"layers lies from 0 to {len(numbers)} and rank is at least 0; got {layers} and {rank}.")
    lowest = numbers[len(numbers) - layers] if layers else numbers[-1] + 1
    return problem.uniform(rank, int(lowest))


def top_down_whole(problem: AllocationProblem, rank_floor: float = RANK_FLOOR) -> IntArray:
    """One rank on the top layers: as many of them as can have the floor rank, then the largest rank that fits.

    Where not even the top layer can have it, the largest rank on that layer; where that is none, what `pack` finds.

    Args:
        problem: the plans that are possible; `max_step` and `pinned` are ignored.
        rank_floor: rank that every adapted module should be able to have, > 0.

    Returns:
        Whole ranks, on the ladder or not, int64 (modules,).
    """
    least = max(1, round(rank_floor))
    counts = range(1, len(np.unique(problem.blocks)) + 1)
    layers = max(1, bisect_left(counts, True, key=lambda k: not problem.fits(top_layers(problem, k, least))))
    ranks = range(1, problem.ladder.ranks[-1] + 1)
    rank = bisect_left(ranks, True, key=lambda r: not problem.fits(top_layers(problem, layers, r)))
    return (
        top_layers(problem, layers, rank)
        if rank
        else pack(problem.fresh(), np.zeros(len(problem.ranks)), rank_floor=1.0)
    )


def top_down(problem: AllocationProblem, rank_floor: float = RANK_FLOOR) -> IntArray:
    """`top_down_whole` that spends everything: single modules of the next layer down, then equal ranks on the ladder.

    Args:
        problem: the plans that are possible; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.
        rank_floor: rank that an adapted module should be able to have, > 0.

    Returns:
        Ranks on the ladder, int64 (modules,), of which none can rise further.
    """
    fresh = problem.fresh()
    scores = np.zeros(len(problem.ranks))
    return project(fresh, pack(fresh, scores, rank_floor), scores).ranks
