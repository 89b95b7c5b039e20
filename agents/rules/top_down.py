"""top-down: equal ranks on as many top layers as can have the floor rank; and the same with other floors and orders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, decision_from_scores


@dataclass(frozen=True)
class TopDown:
    """Equal ranks on the top layers: as many layers as can have the floor rank, the lowest in part.

    Attributes:
        name: what logs and tables call it.
        rank_floor_shift: octaves by which the floor differs from top-down's; below 0 the adapters go deeper and are
            thinner. Under a parameter budget the floor is rank 1 already, and lower ones change nothing.
    """

    name: str = "top-down"
    rank_floor_shift: float = 0.0

    def decide(self, observation: Observation) -> Decision:
        """Equal scores."""
        return decision_from_scores(observation, np.zeros(len(observation.modules)), (self.rank_floor_shift, 0.0))


@dataclass(frozen=True)
class LargeModulesFirst:
    """top-down that prefers modules whose ranks cost most, which are the MLP's: rank goes as d_in + d_out, nearly."""

    name: str = "top-down-mlp"

    def decide(self, observation: Observation) -> Decision:
        """Scores are the log cost of a rank."""
        return decision_from_scores(observation, module_feature(observation, "rank_cost"))
