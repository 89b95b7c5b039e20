"""Rules whose ranks rise or fall from layer to layer, whatever the signals are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, decision_from_scores


@dataclass(frozen=True)
class Ramp:
    """Adapts the modules of top-down, with ranks that change from layer to layer by the same factor.

    MoLA found four times as many experts at the top as at the bottom to be best (Gao et al., 2024, arXiv 2402.08562).

    Attributes:
        name: the name in logs and tables.
        factor: the rank of the top layer over that of the bottom layer, > 0.
    """

    name: str = "ramp-up"
    factor: float = 4.0

    def decide(self, observation: Observation) -> Decision:
        """Scores rise or fall evenly with the layer."""
        return decision_from_scores(observation, math.log(self.factor) * module_feature(observation, "relative_depth"))
