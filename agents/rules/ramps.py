"""Ramps: ranks that rise or fall with the height of the layer, whatever the signals say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, decision_from_scores


@dataclass(frozen=True)
class Ramp:
    """top-down's placement, and ranks that change evenly (in logs) from the bottom layer to the top one.

    Four times as much at the top as at the bottom is the shape that MoLA found best for its experts (Gao et al., 2024,
    arXiv 2402.08562).

    Attributes:
        name: what logs and tables call it.
        factor: rank at the top over rank at the bottom, > 0.
    """

    name: str = "ramp-up"
    factor: float = 4.0

    def decide(self, observation: Observation) -> Decision:
        """Scores go with the height."""
        return decision_from_scores(observation, math.log(self.factor) * module_feature(observation, "relative_depth"))
