"""The spaces of the environments, and actions read with a clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ..allocation.actions import PLACEMENT, SCORE_BOUND
from ..allocation.features import MODULE_FEATURES, RUN_FEATURES
from ..allocation.problem import AllocationProblem
from ..common.arrays import IntArray
from ..errors import ConfigError
from ..lora.ladder import DEFAULT_RANKS

TOP = len(DEFAULT_RANKS) - 1
"""The highest rung of the rank ladder, and the largest delta in rungs."""


def observation_space(max_modules: int) -> spaces.Dict:
    """Features of modules (flat, module after module) and of the run, and which modules exist."""
    return spaces.Dict(
        {
            "module_features": spaces.Box(-3, 3, (max_modules * len(MODULE_FEATURES),), np.float32),
            "run_features": spaces.Box(-3, 3, (len(RUN_FEATURES),), np.float32),
            "mask": spaces.MultiBinary(max_modules),
        }
    )


def delta_space(max_modules: int) -> spaces.MultiDiscrete:
    """A number of rungs for each module, plus TOP."""
    return spaces.MultiDiscrete(np.full(max_modules, 2 * TOP + 1))


def score_space(max_modules: int) -> spaces.Box:
    """A score for each module, and the steering numbers."""
    return spaces.Box(-SCORE_BOUND, SCORE_BOUND, (max_modules + len(PLACEMENT),), np.float32)


def read_deltas(action: Any, max_modules: int, problem: AllocationProblem) -> IntArray:
    """The wanted ranks, int64 (modules,), of an action of `delta_space`: so many rungs from the current ones.

    Raises:
        ConfigError: the action has another shape, or a value out of range.
    """
    array = np.asarray(action)
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool((array == np.round(array)).all()))
    if array.shape != (max_modules,) or not whole or not bool(((array >= 0) & (array <= 2 * TOP)).all()):
        shown = np.array2string(array, threshold=12)
        raise ConfigError(f"An action holds {max_modules} whole numbers from 0 to {2 * TOP}; got {shown}.")
    return problem.ladder.step(problem.ranks, array[: len(problem.ranks)].astype(np.int64) - TOP)


def read_scores(action: Any, max_modules: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (count,) and steering numbers, from an action of `score_space`; values out of range are clipped.

    Raises:
        ConfigError: the action has another shape, or a value that is not finite.
    """
    values = np.asarray(action, dtype=np.float64)
    size = max_modules + len(PLACEMENT)
    if values.shape != (size,) or not np.isfinite(values).all():
        shown = np.array2string(values, threshold=12)
        raise ConfigError(
            f"Scores are {size} finite numbers, the corrections of floor and depth bias last; got {shown}."
        )
    values = np.clip(values, -SCORE_BOUND, SCORE_BOUND)
    return values[:count], values[max_modules:]
