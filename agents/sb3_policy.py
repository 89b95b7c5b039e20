"""The network as a Stable-Baselines3 policy, and PPO's advantages relative to a group of like episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from ..env.observation import MODULE_FEATURES
from .config import NetworkConfig
from .network import RankNetwork


class MaskedGaussian(DiagGaussianDistribution):
    """A diagonal Gaussian in which padding counts neither in log-probability nor in entropy."""

    def masked(self, mean: torch.Tensor, log_std: torch.Tensor, mask: torch.Tensor) -> MaskedGaussian:
        """Set mean, log standard deviation and mask, all (batch, action size)."""
        self.distribution = torch.distributions.Normal(mean, log_std.exp())
        self.mask = mask
        return self

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability density of actions (batch, action size), shape (batch,)."""
        density: torch.Tensor = self.distribution.log_prob(actions)  # type: ignore[no-untyped-call]
        return (density * self.mask).sum(-1)

    def entropy(self) -> torch.Tensor:
        """Entropy, shape (batch,)."""
        entropy: torch.Tensor = self.distribution.entropy()  # type: ignore[no-untyped-call]
        return (entropy * self.mask).sum(-1)


class RankPolicy(ActorCriticPolicy):
    """`RankNetwork` for PPO: observation Dict(module_features, run_features, mask), action Box(modules + 1).

    Args:
        network: size and start of the network.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        network: NetworkConfig | None = None,
        **options: Any,
    ) -> None:
        self.network_config = network or NetworkConfig()
        super().__init__(observation_space, action_space, lr_schedule, ortho_init=False, **options)

    def _build(self, lr_schedule: Schedule) -> None:
        self.network = RankNetwork(self.network_config)
        self.action_dist = MaskedGaussian(int(np.prod(self.action_space.shape or (1,))))
        self.optimizer = self.optimizer_class(self.network.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _evaluate(self, obs: PyTorchObs) -> tuple[MaskedGaussian, torch.Tensor]:
        assert isinstance(obs, dict)
        mask = obs["mask"].float()
        modules = obs["module_features"].float().reshape(len(mask), mask.shape[1], len(MODULE_FEATURES))
        mean, log_std, value = self.network(modules, obs["run_features"].float(), mask)
        everything = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        distribution = MaskedGaussian(mean.shape[1]).masked(mean, log_std, everything)
        return distribution, value.unsqueeze(-1)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions (batch, action size), values (batch, 1) and log-probabilities (batch,)."""
        distribution, value = self._evaluate(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, value, distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values, log-probabilities and entropies of given actions."""
        distribution, value = self._evaluate(obs)
        return value, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> MaskedGaussian:
        """The action distribution."""
        return self._evaluate(obs)[0]

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Values, (batch, 1)."""
        return self._evaluate(obs)[1]


def decision_index(episode_starts: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many decisions of its episode each transition has behind it; input and output (steps, envs)."""
    index = np.zeros(episode_starts.shape, dtype=np.int64)
    for step in range(1, len(index)):
        index[step] = np.where(episode_starts[step] > 0, 0, index[step - 1] + 1)
    return index


class GroupRolloutBuffer(DictRolloutBuffer):
    """Advantages relative to a group, as in GRPO (Shao et al., 2024, arXiv 2402.03300) and RLOO.

    All episodes of one environment in one rollout share task, seed and batches, so the mean return of the group is a
    far better baseline than a critic: what is left is the effect of the actions. The group is one environment's
    column, at the same decision.
    """

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """Undiscounted returns, less the mean return of the group at the same decision."""
        super().compute_returns_and_advantage(last_values, dones)
        index = decision_index(self.episode_starts)
        for decision in range(int(index.max()) + 1):
            members = index == decision
            means = np.where(members, self.returns, 0).sum(axis=0) / np.maximum(members.sum(axis=0), 1)
            self.advantages = np.where(members, self.returns - means, self.advantages).astype(np.float32)
