"""What is left of a policy that takes no notice of the task: its mean action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...allocation.actions import base_depth_bias, base_rank_floor
from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, Policy, decision_from_scores
from ...common.arrays import FloatArray

KNOTS = np.linspace(0, 1, 5)
"""Heights at which scores are averaged; between them they are interpolated."""


@dataclass(frozen=True)
class Constant:
    """The same action whatever is seen: a score for each height, and corrections of floor and depth bias.

    Attributes:
        name: what logs and tables call it.
        scores: at each of `KNOTS`.
        placement: corrections of the rank floor (log2) and of the depth bias.
    """

    name: str
    scores: tuple[float, ...]
    placement: tuple[float, ...]

    def decide(self, observation: Observation) -> Decision:
        """The constant action."""
        scores = np.interp(module_feature(observation, "relative_depth"), KNOTS, self.scores)
        return decision_from_scores(observation, scores, self.placement)


def constant_of(policy: Policy, observations: Sequence[Observation], name: str) -> Constant:
    """A policy's mean action over some tasks.

    Modules of different models have nothing in common but their height, so scores are averaged by it: the least
    squares fit of what `Constant` interpolates.

    Args:
        policy: one that decides by scores and a floor.
        observations: first decisions.
        name: of the constant policy.
    """
    heights, scores, placement = [], [], []
    for observation in observations:
        decision = policy.decide(observation)
        heights.append(module_feature(observation, "relative_depth"))
        scores.append(decision.scores)
        problem = observation.problem
        placement.append(
            (np.log2(decision.rank_floor / base_rank_floor(problem)), decision.depth_bias - base_depth_bias(problem))
        )
    fitted = np.linalg.lstsq(_hats(np.concatenate(heights)), np.concatenate(scores), rcond=None)[0]
    return Constant(name, tuple(fitted.tolist()), tuple(np.mean(placement, axis=0).tolist()))


def _hats(heights: FloatArray) -> FloatArray:
    """Weights of each knot in the interpolated value at each height, (heights, knots)."""
    return np.stack([np.interp(heights, KNOTS, one) for one in np.eye(len(KNOTS))], axis=1)
