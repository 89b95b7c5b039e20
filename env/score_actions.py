"""Scores in place of rank deltas: the action form in which policies learn.

A policy gives each module a score (its log rank relative to the others) and two numbers: one for the rank floor, which
decides how many modules are adapted, and one for the tilt, which decides how much upper layers come before lower ones.
`decode` turns them into the rank deltas that the environment takes. Free choices per module did not learn
(docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..lora.cost import FloatArray, ParameterCost
from ..lora.ladder import IntArray
from ..lora.plan import PlanProblem, pack
from .rank_allocation import RankAllocationEnv
from .spaces import read_scores, score_space

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


class ScoreActions(gym.Wrapper[Any, Any, Any, Any]):
    """Takes `Box(-4, 4, (max_modules + 2,))`: one score for each module, and the steering numbers last.

    Args:
        env: a `RankAllocationEnv`, possibly wrapped.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        if not isinstance(env.unwrapped, RankAllocationEnv):
            raise ConfigError(f"ScoreActions wraps RankAllocationEnv, not {type(env.unwrapped).__name__}.")
        self._base: RankAllocationEnv = env.unwrapped
        self.action_space = score_space(self._base.max_modules)

    def step(self, action: NDArray[np.float32]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Decode the scores and take the decision; scores also order the projection."""
        observation = self._base.observation
        scores, steering = read_scores(action, self._base.max_modules, len(observation.modules))
        deltas, *_ = decode(observation.problem, scores, steering)
        return self._base.decide(deltas, scores)
