"""A trained network behind the policy contract."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..env.observation import Observation
from .gaussian import CorrelatedGaussian
from .network import RankNetwork
from .policy import Decision, decision_from_scores, signal_score


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Decides by the network's mean action, and by the rule's in part where it is unsure.

    The critics say how much better than the rule a run will end. Where they expect nothing, or disagree by more than
    they expect, the action goes towards the rule's.

    Attributes:
        name: what logs and tables call it.
        network: on the CPU, in evaluation mode.
        caution: standard deviations of the critics that count against the network: its share in the action falls from
            1, where they expect more than that, to 0, where they expect as much of a loss. 0 for the network alone.
    """

    name: str
    network: RankNetwork
    caution: float = 0.0

    @torch.no_grad()
    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation; deterministic."""
        count = len(observation.modules)
        mask = torch.ones(1, count)
        action = self.network(
            torch.from_numpy(observation.modules).unsqueeze(0), torch.from_numpy(observation.run).unsqueeze(0), mask
        )
        density = float(CorrelatedGaussian(action, mask).log_prob(action.mean))
        expected, uncertainty = float(action.values.mean()), float(action.values.std(unbiased=False))
        share = self._share(expected, uncertainty)
        values = share * action.mean[0].double().numpy()
        scores = values[:count] + (1 - share) * self.network.config.signal_gain * signal_score(observation)
        decision = decision_from_scores(observation, scores, values[count:], density)
        return replace(decision, expected=expected, uncertainty=uncertainty)

    def _share(self, expected: float, uncertainty: float) -> float:
        """The network's share in the action, 0 to 1."""
        if not self.caution:
            return 1.0
        return min(max(0.5 + expected / max(2 * self.caution * uncertainty, 1e-9), 0.0), 1.0)
