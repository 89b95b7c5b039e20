"""A trained network behind the policy contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..env.observation import Observation
from .network import RankNetwork
from .policy import Decision, decision_from_scores


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Decides by the network's mean action.

    Attributes:
        name: what logs and tables call it.
        network: on the CPU, in evaluation mode.
    """

    name: str
    network: RankNetwork

    @torch.no_grad()
    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation; deterministic."""
        count = len(observation.modules)
        mean, log_std, _ = self.network(
            torch.from_numpy(observation.modules).unsqueeze(0),
            torch.from_numpy(observation.run).unsqueeze(0),
            torch.ones(1, count),
        )
        density = -(log_std + 0.5 * np.log(2 * np.pi)).sum()
        values = mean[0].double().numpy()
        return decision_from_scores(observation, values[:count], float(values[-1]), float(density))
