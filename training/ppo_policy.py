"""The network as a Stable-Baselines3 policy, and PPO's advantages relative to a group of like episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from ..agents.learned.config import NetworkConfig
from ..agents.learned.network import CorrelatedGaussian, RankNetwork
from ..agents.observation import MODULE_FEATURES


class RankPolicy(ActorCriticPolicy):
    """`RankNetwork` for PPO: observation Dict(module_features, run_features, mask), action Box(modules + 2).

    Args:
        network: size and start of the network.
    """

    network: RankNetwork

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        network: NetworkConfig | None = None,
        **options: Any,
    ) -> None:
        self.network_config: NetworkConfig = network or NetworkConfig()
        super().__init__(observation_space, action_space, lr_schedule, ortho_init=False, **options)

    def _build(self, lr_schedule: Schedule) -> None:
        self.network = RankNetwork(self.network_config)
        self.optimizer = self.optimizer_class(self.network.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _evaluate(self, obs: PyTorchObs) -> tuple[CorrelatedGaussian, torch.Tensor]:
        """The action's distribution, and what each critic expects, (batch, critics)."""
        assert isinstance(obs, dict)
        mask = obs["mask"].float()
        modules = obs["module_features"].float().reshape(len(mask), mask.shape[1], len(MODULE_FEATURES))
        action = self.network(modules, obs["run_features"].float(), mask)
        return CorrelatedGaussian(action, mask), action.values

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions (batch, action size), values (batch, 1) and log-probabilities (batch,)."""
        distribution, values = self._evaluate(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values.mean(dim=1, keepdim=True), distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values, log-probabilities and entropies of given actions.

        Each value is that of a critic drawn by lot, so that critics learn from different runs and disagree where they
        have seen little.
        """
        distribution, values = self._evaluate(obs)
        chosen = torch.randint(values.shape[1], (len(values), 1), device=values.device)
        return values.gather(1, chosen), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> CorrelatedGaussian:  # type: ignore[override]
        """The action distribution."""
        return self._evaluate(obs)[0]

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Values, (batch, 1)."""
        return self._evaluate(obs)[1].mean(dim=1, keepdim=True)


LEAST_SPREAD = 0.25
"""Added to the standard deviation of a group's returns: where all episodes end alike, what is left is noise."""


class GroupRolloutBuffer(DictRolloutBuffer):
    """Advantages relative to a group, as in GRPO (Shao et al., 2024, arXiv 2402.03300) and RLOO.

    Neighbouring episodes share task, seed and batches, so the mean return of the group is a far better baseline than a
    critic: what is left is the effect of the actions.

    Args:
        group: episodes of a group; the number of environments is a multiple of it.
    """

    def __init__(self, *arguments: Any, group: int, **options: Any) -> None:
        self.group = group
        super().__init__(*arguments, **options)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """Undiscounted returns, less the group's mean return from the same decision on, over the group's spread."""
        super().compute_returns_and_advantage(last_values, dones)
        groups = self.returns.reshape(len(self.returns), -1, self.group)
        centred = groups - groups.mean(axis=2, keepdims=True)
        relative = centred / (groups.std(axis=2, keepdims=True) + LEAST_SPREAD)
        self.advantages = relative.reshape(self.returns.shape).astype(np.float32)
