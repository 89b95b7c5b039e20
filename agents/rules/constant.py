"""A policy's mean action over several tasks, as a policy of its own: it pays no attention to the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...allocation.actions import base_depth_bias, base_rank_floor
from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, Policy, decision_from_scores
from ...common.arrays import FloatArray

KNOTS = np.linspace(0, 1, 5)
"""Relative depths at which scores are given; between them they are interpolated."""


@dataclass(frozen=True)
class Constant:
    """The same action at every decision: scores by relative depth, and a placement.

    Attributes:
        name: the name in logs and tables.
        scores: at each of `KNOTS`.
        placement: see `PLACEMENT`.
    """

    name: str
    scores: tuple[float, ...]
    placement: tuple[float, ...]

    def decide(self, observation: Observation) -> Decision:
        """Take the constant action."""
        scores = np.interp(module_feature(observation, "relative_depth"), KNOTS, self.scores)
        return decision_from_scores(observation, scores, self.placement)


def constant_of(policy: Policy, observations: Sequence[Observation], name: str) -> Constant:
    """The mean action of a policy over several tasks.

    Modules of different models have only their relative depth in common. So the scores at `KNOTS` are those from which
    interpolation comes nearest to the policy's scores, by least squares. A plan that follows from no scores counts with
    the logs of its ranks, half a rank where there is none, and its lowest rank as the rank floor.

    Args:
        policy: decides.
        observations: of first decisions.
        name: of the constant policy.
    """
    depths, scores, placement = [], [], []
    for observation in observations:
        decision, problem = policy.decide(observation), observation.problem
        base_floor, base_bias = base_rank_floor(problem), base_depth_bias(problem)
        depths.append(module_feature(observation, "relative_depth"))
        if decision.rank_floor > 0:
            scores.append(decision.scores)
            placement.append((np.log2(decision.rank_floor / base_floor), decision.depth_bias - base_bias))
        else:
            logs = np.log(np.maximum(decision.ranks, 0.5))
            scores.append(logs - logs.mean())
            lowest = decision.ranks[decision.ranks > 0].min(initial=problem.ladder.ranks[-1])
            placement.append((np.log2(lowest / base_floor), 0.0))
    fitted = np.linalg.lstsq(_hats(np.concatenate(depths)), np.concatenate(scores), rcond=None)[0]
    return Constant(name, tuple(fitted.tolist()), tuple(np.mean(placement, axis=0).tolist()))


def _hats(depths: FloatArray) -> FloatArray:
    """The weight of each knot in the interpolation at each relative depth, (depths, knots)."""
    return np.stack([np.interp(depths, KNOTS, one) for one in np.eye(len(KNOTS))], axis=1)
