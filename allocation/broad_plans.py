"""Plans that are spread widely enough for a goal of cost to take them: a floor on how concentrated they may be.

Of plans of 49 real fine-tunes, those above this floor ended more than 1 % above plain LoRA in 27 % (texts) and 19 %
(labels), those below it in 84 and 57 % (docs/experiments.md). Networks that are sure of a plan below are often wrong.
"""

from __future__ import annotations

import numpy as np

from ..common.arrays import BoolArray, IntArray
from ..lora.ladder import REFERENCE_RANK
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
