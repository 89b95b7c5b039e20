"""Correlated exploration: each score has noise of its own, and all move together along a few features.

Noise on a single module's score is soon lost among dozens of them. Noise on a gain (scores follow a signal more, upper
layers come forward) changes a plan as a whole, and its effect can be told from the return. The density is that of a
Gaussian with covariance diag(std^2) + F F^T, by the Woodbury identity.
"""

from __future__ import annotations

import math

import torch

from .network import Action


class CorrelatedGaussian:
    """The distribution of an `Action`; padding counts neither in its density nor in its entropy.

    Args:
        action: from the network, for a batch.
        mask: (batch, modules), 1 for modules that exist.
    """

    def __init__(self, action: Action, mask: torch.Tensor) -> None:
        placement = action.mean.shape[1] - mask.shape[1]
        self.mask = torch.cat([mask, mask.new_ones(len(mask), placement)], dim=1)
        self.mean, self.std, self.factors = action.mean, action.std, action.factors
        self._whitened = self.factors / self.std.unsqueeze(-1)
        inner = self._whitened.mT @ self._whitened
        self._root = torch.linalg.cholesky(inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device))

    def _log_volume(self) -> torch.Tensor:
        """Half the log determinant of the covariance, (batch,)."""
        return (self.std.log() * self.mask).sum(-1) + torch.diagonal(self._root, dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability density of actions (batch, action size), shape (batch,)."""
        z = (actions - self.mean) / self.std * self.mask
        along = torch.linalg.solve_triangular(self._root, self._whitened.mT @ z.unsqueeze(-1), upper=False)
        square: torch.Tensor = z.square().sum(-1) - along.square().sum((-2, -1))
        return -0.5 * square - self._log_volume() - 0.5 * math.log(2 * math.pi) * self.mask.sum(-1)

    def entropy(self) -> torch.Tensor:
        """Entropy, shape (batch,)."""
        return self._log_volume() + 0.5 * (1 + math.log(2 * math.pi)) * self.mask.sum(-1)

    def sample(self) -> torch.Tensor:
        """Actions, (batch, action size); zero for padding."""
        own = self.std * torch.randn_like(self.mean) * self.mask
        shared = self.factors @ torch.randn_like(self.factors[:, 0]).unsqueeze(-1)
        return self.mean + own + shared.squeeze(-1)

    def get_actions(self, deterministic: bool = False) -> torch.Tensor:
        """The mean action, or drawn ones."""
        return self.mode() if deterministic else self.sample()

    def mode(self) -> torch.Tensor:
        """The mean action."""
        return self.mean
