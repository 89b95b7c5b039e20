"""The spaces of the environments, and actions read with a clear error."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces

from ..allocation.actions import PLACEMENT, SCORE_BOUND
from ..allocation.features import MODULE_FEATURES, MOST_FEATURE, RUN_FEATURES
from ..allocation.observation import Observation
from ..allocation.policy import Decision, decision_from_scores
from ..errors import ConfigError, UnknownNameError
from ..lora.ladder import DEFAULT_RANKS

Actions = Literal["deltas", "scores"]
ACTIONS: tuple[Actions, ...] = get_args(Actions)
"""Forms of actions: a number of rungs for each module, or a score for each module and two numbers that steer the whole
plan. Policies learn in scores: free choices per module did not learn (docs/experiments.md)."""

TOP = len(DEFAULT_RANKS) - 1
"""The highest rung of the rank ladder, and the largest delta in rungs."""


def observation_space(max_modules: int) -> spaces.Dict:
    """Features of modules (flat, module after module) and of the run, and which modules exist."""
    sizes = {"module_features": max_modules * len(MODULE_FEATURES), "run_features": len(RUN_FEATURES)}
    return spaces.Dict(
        {
            **{name: spaces.Box(-MOST_FEATURE, MOST_FEATURE, (size,), np.float32) for name, size in sizes.items()},
            "mask": spaces.MultiBinary(max_modules),
        }
    )


def action_space(actions: str, max_modules: int) -> spaces.MultiDiscrete | spaces.Box:
    """The space of one form of actions: a number of rungs plus TOP for each module, or their scores and the placement.

    Raises:
        UnknownNameError: there is no such form.
    """
    if actions not in ACTIONS:
        raise UnknownNameError.of("form of actions", str(actions), ACTIONS)
    if actions == "deltas":
        return spaces.MultiDiscrete(np.full(max_modules, 2 * TOP + 1))
    return spaces.Box(-SCORE_BOUND, SCORE_BOUND, (max_modules + len(PLACEMENT),), np.float32)


def read_action(actions: str, action: Any, max_modules: int, observation: Observation) -> Decision:
    """The decision that an action asks for; scores out of range are clipped.

    Args:
        actions: its form.
        action: of `action_space`.
        max_modules: padding of observations and actions.
        observation: of the decision.

    Raises:
        ConfigError: the action has another shape, or a value that is not allowed.
    """
    problem, count = observation.problem, len(observation.modules)
    if actions == "deltas":
        deltas = np.asarray(action)
        whole = deltas.dtype.kind in "iu" or (deltas.dtype.kind == "f" and bool((deltas == np.round(deltas)).all()))
        if deltas.shape != (max_modules,) or not whole or not bool(((deltas >= 0) & (deltas <= 2 * TOP)).all()):
            shown = np.array2string(deltas, threshold=12)
            raise ConfigError(f"An action holds {max_modules} whole numbers from 0 to {2 * TOP}; got {shown}.")
        return Decision(problem.ladder.step(problem.ranks, deltas[:count].astype(np.int64) - TOP), np.zeros(count))
    values = np.asarray(action, dtype=np.float64)
    size = max_modules + len(PLACEMENT)
    if values.shape != (size,) or not np.isfinite(values).all():
        shown = np.array2string(values, threshold=12)
        raise ConfigError(f"Scores are {size} finite numbers, rank floor and depth bias last; got {shown}.")
    values = np.clip(values, -SCORE_BOUND, SCORE_BOUND)
    return decision_from_scores(observation, values[:count], values[max_modules:])
