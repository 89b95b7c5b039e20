"""A trained network behind the policy contract."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..env.observation import Observation
from .gaussian import CorrelatedGaussian
from .network import RankNetwork
from .policy import Decision, decision_from_scores


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Decides by the network's mean action; its critics tell what to expect of it, and how sure they are.

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
        mask = torch.ones(1, count)
        action = self.network(
            torch.from_numpy(observation.modules).unsqueeze(0), torch.from_numpy(observation.run).unsqueeze(0), mask
        )
        density = float(CorrelatedGaussian(action, mask).log_prob(action.mean))
        values = action.mean[0].double().numpy()
        decision = decision_from_scores(observation, values[:count], values[count:], density)
        expected, uncertainty = float(action.values.mean()), float(action.values.std(unbiased=False))
        return replace(decision, expected=expected, uncertainty=uncertainty)
