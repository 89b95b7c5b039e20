"""Correlated exploration: each score has noise of its own, and all move together along a few features.

Noise on a single module's score is soon lost among dozens of them. Noise on a gain (scores follow a signal more, upper
layers come forward) changes a plan as a whole, and its effect can be told from the return. The covariance is
diag(std^2) + F F^T with few columns in F, torch's `LowRankMultivariateNormal`.
"""

from __future__ import annotations

import math

import torch
from torch.distributions import LowRankMultivariateNormal

from .network import Action


class CorrelatedGaussian:
    """The distribution of an `Action`; padding counts neither in its density nor in its entropy.

    Args:
        action: from the network, for a batch.
        mask: (batch, modules), 1 for modules that exist.
    """

    factors: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, action: Action, mask: torch.Tensor) -> None:
        placement = action.mean.shape[1] - mask.shape[1]
        self.mask: torch.Tensor = torch.cat([mask, mask.new_ones(len(mask), placement)], dim=1)
        self.mean, self.std, self.factors = action.mean, action.std, action.factors
        # Padding has a standard normal of its own, whose share is taken off again.
        self._exists, self._padding = self.mask > 0, (1 - self.mask).sum(-1)
        self._normal = LowRankMultivariateNormal(
            self.mean,
            self.factors * self.mask.unsqueeze(-1),
            torch.where(self._exists, self.std, 1.0).square(),
            validate_args=False,
        )

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability density of actions (batch, action size), shape (batch,)."""
        density: torch.Tensor = self._normal.log_prob(torch.where(self._exists, actions, self.mean))  # type: ignore[no-untyped-call]
        return density + 0.5 * math.log(2 * math.pi) * self._padding

    def entropy(self) -> torch.Tensor:
        """Entropy, shape (batch,)."""
        entropy: torch.Tensor = self._normal.entropy()  # type: ignore[no-untyped-call]
        return entropy - 0.5 * (1 + math.log(2 * math.pi)) * self._padding

    def sample(self) -> torch.Tensor:
        """Actions, (batch, action size); zero for padding.

        Noise of each number's own is drawn before the noise that is shared, unlike by torch: trainings with the same
        seed stay comparable.
        """
        alone = self.std * torch.randn_like(self.mean) * self.mask
        shared = self.factors @ torch.randn_like(self.factors[:, 0]).unsqueeze(-1)
        return self.mean + alone + shared.squeeze(-1)

    def get_actions(self, deterministic: bool = False) -> torch.Tensor:
        """The mean action, or drawn ones."""
        return self.mode() if deterministic else self.sample()

    def mode(self) -> torch.Tensor:
        """The mean action."""
        return self.mean
