"""Scores in place of rank deltas: the action form in which policies learn.

A policy gives each module a score (its log rank relative to the others) and two numbers: one for the rank floor, which
decides how many modules are adapted, and one for the depth bias, which decides how much upper layers come before lower
ones. `decision_from_scores` turns them into a decision. Free choices per module did not learn
(docs/experiments.md).
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ..allocation.policy import decision_from_scores
from ..errors import ConfigError
from .rank_allocation import RankAllocationEnv
from .spaces import read_scores, score_space


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
        scores, placement = read_scores(action, self._base.max_modules, len(observation.modules))
        return self._base.decide(decision_from_scores(observation, scores, placement))
