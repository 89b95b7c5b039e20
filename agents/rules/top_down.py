"""The rule top-down, and variants of it with another rank floor or with unequal scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, decision_from_scores


@dataclass(frozen=True)
class TopDown:
    """Equal ranks on as many top layers as can have the rank floor, and on some modules of the next layer down.

    Attributes:
        name: the name in logs and tables.
        rank_floor_shift: log2 of a factor on the rank floor; below 0, more layers have smaller ranks. Under a budget of
            parameters the rank floor is 1, and a lower one changes nothing.
    """

    name: str = "top-down"
    rank_floor_shift: float = 0.0

    def decide(self, observation: Observation) -> Decision:
        """Equal scores, and the shift of the rank floor."""
        return decision_from_scores(observation, np.zeros(len(observation.modules)), (self.rank_floor_shift, 0.0))


@dataclass(frozen=True)
class LargeModulesFirst:
    """As top-down, with more rank for modules on which a rank costs more: those of the MLPs, for the most part."""

    name: str = "top-down-mlp"

    def decide(self, observation: Observation) -> Decision:
        """Scores are the log cost of a rank."""
        return decision_from_scores(observation, module_feature(observation, "rank_cost"))
