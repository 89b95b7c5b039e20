"""Plans that read no signal: one rank, or nearly one, on the top layers.

Without gradient checkpointing, adapting the top layers at a useful rank was better than any other plan with the same
bytes (docs/design.md). One rank on whole layers is `rankpilot.allocation.plan.uniform_ranks`.
"""

from __future__ import annotations

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError
from .plan import pack, project
from .problem import AllocationProblem

RANK_FLOOR = 16.0
"""The rank that every adapted module should be able to have: about a quarter of the width of the models on which it was
measured."""


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


def top_down(problem: AllocationProblem) -> IntArray:
    """Equal ranks on as many top layers as can have `RANK_FLOOR`, and on some modules of the next layer down.

    Where the top layer cannot have the rank floor, a lower one is taken. Nothing is left unspent.

    Args:
        problem: the plans that are possible; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.

    Returns:
        Ranks on the ladder, int64 (modules,), of which none can rise further.
    """
    fresh = problem.fresh()
    scores = np.zeros(len(problem.ranks))
    return project(fresh, pack(fresh, scores, RANK_FLOOR), scores).ranks
