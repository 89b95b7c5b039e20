"""Scores in place of rank deltas: the action form in which policies learn.

A policy gives each module a score (its log rank relative to the others) and one number for the rank floor, which
decides how deep the adapters go; `decode` turns both into the rank deltas that the environment takes. Free choices per
module did not learn (docs/experiments.md).
"""

from __future__ import annotations

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


def base_floor(problem: PlanProblem) -> float:
    """The rank floor before a policy's correction: depth costs nothing under a parameter budget."""
    return 1.0 if isinstance(problem.cost, ParameterCost) else FLOOR


def decode(problem: PlanProblem, scores: FloatArray, floor_shift: float) -> tuple[IntArray, float]:
    """Rank deltas that scores ask for.

    Args:
        problem: the plans that are possible now.
        scores: log rank relative to the other modules, (modules,).
        floor_shift: log2 of the factor on the rank floor. Under a parameter budget depth costs nothing, and
            the floor starts at rank 1 instead of 16.

    Returns:
        Deltas in rungs, int64 (modules,), and the floor as a rank.
    """
    floor = base_floor(problem) * 2.0**floor_shift
    target = pack(problem, scores, floor)
    return problem.ladder.rung(target) - problem.ladder.rung(problem.ranks), floor


class ScoreActions(gym.Wrapper[Any, Any, Any, Any]):
    """Takes `Box(-4, 4, (max_modules + 1,))`: one score for each module, and the floor's correction last.

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
        scores, shift = read_scores(action, self._base.max_modules, len(observation.modules))
        deltas, _ = decode(observation.problem, scores, shift)
        return self._base.decide(deltas, scores)
