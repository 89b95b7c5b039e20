"""An agent's network as a Stable-Baselines3 policy for MaskablePPO: `MaskablePPO(GroupPolicy, env)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.errors import RunFolderError, first_line, naming_extras
from ..common.files import atomic_path, load_archive
from ..decide.groups import GROUP_FEATURES
from .policy_file import GroupNetwork, NetworkConfig

with naming_extras():
    from gymnasium import spaces
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


class _Flat(BaseFeaturesExtractor):
    """Flatten an observation to one row, (batch, features): groups, mask of existing groups, run."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, spaces.flatdim(observation_space))

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([observations[name].float() for name in ("groups", "present", "run")], dim=1)


class _Heads(nn.Module):
    """Compute scores and values from `_Flat` rows, as Stable-Baselines3's latents; no further layer follows."""

    latent_dim_vf = 1

    def __init__(self, network: GroupNetwork, groups: int) -> None:
        super().__init__()
        self.network, self._groups = network, groups
        self.latent_dim_pi = network.rate.out_features + groups

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._groups * len(GROUP_FEATURES)
        flat, present, run = rows.tensor_split([size, size + self._groups], 1)
        scores, values = self.network(torch.unflatten(flat, 1, (self._groups, -1)), present, run)
        return scores, values

    def forward_actor(self, rows: torch.Tensor) -> torch.Tensor:
        return self.forward(rows)[0]

    def forward_critic(self, rows: torch.Tensor) -> torch.Tensor:
        return self.forward(rows)[1]


class GroupPolicy(MaskableActorCriticPolicy):
    """Actor and critic in one `GroupNetwork`; its scores are the logits of the actions.

    Args:
        observation_space: observation space of `rankpilot/FineTune-v8`.
        action_space: action space of the same environment.
        lr_schedule: learning rate as a function of the remaining share of training.
        width: width of the network's hidden layers.
        kwargs: further arguments of `MaskableActorCriticPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Callable[[float], float],
        *,
        width: int = 64,
        **kwargs: Any,
    ) -> None:
        self._width = width
        super().__init__(
            observation_space, action_space, lr_schedule, ortho_init=False, features_extractor_class=_Flat, **kwargs
        )

    @property
    def network(self) -> GroupNetwork:
        """The trained network, saved as the agent."""
        heads = self.mlp_extractor
        assert isinstance(heads, _Heads)
        return heads.network

    def _build_mlp_extractor(self) -> None:
        groups = int(self.observation_space["present"].shape[0])  # type: ignore[index]
        self.mlp_extractor = _Heads(GroupNetwork(NetworkConfig(self._width)), groups)  # type: ignore[assignment]

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        super()._build(lr_schedule)
        self.action_net, self.value_net = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]


DRAWN = 0.2
"""Share of random actions during behavior cloning."""

PASSES = 40
"""Epochs over the collected data during behavior cloning."""


def clone(model: MaskablePPO, envs: Any, rounds: int, seed: int) -> float:
    """Clone the environment's baseline rule into a policy, including in states after random actions.

    Args:
        model: model with the policy to train.
        envs: a `StackVecEnv`; its `rule_actions` are the targets.
        rounds: rounds of episodes played by the rule, with a fifth of the actions drawn at random.
        seed: seed of the draws.

    Returns:
        Share of the collected states where the trained policy agrees with the rule.
    """
    draw, kept, seen = np.random.default_rng([seed, 1]), list[Any](), envs.reset()
    for _ in range(rounds):
        over = np.zeros(1)
        while not over.all():
            masks, ruled = np.stack(envs.env_method("action_masks")), envs.rule_actions()
            kept.append((seen, masks, ruled))
            other = np.array([draw.choice(np.flatnonzero(mask)) for mask in masks])
            seen, _, over, _ = envs.step(np.where(draw.random(len(ruled)) < DRAWN, other, ruled))
    policy: Any = model.policy
    arrays = {name: np.concatenate([seen[name] for seen, _, _ in kept]) for name in kept[0][0]}
    seen, _ = policy.obs_to_tensor(arrays)
    masks = np.concatenate([mask for _, mask, _ in kept])
    wanted = torch.from_numpy(np.concatenate([ruled for *_, ruled in kept]))
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(PASSES):
        for rows in torch.split(torch.randperm(len(wanted)), 256):
            part = {name: value[rows] for name, value in seen.items()}
            _, log_prob, _ = policy.evaluate_actions(part, wanted[rows], action_masks=masks[rows.numpy()])
            optimizer.zero_grad()
            (-log_prob.mean()).backward()
            optimizer.step()
    with torch.no_grad():
        chosen = policy.get_distribution(seen, action_masks=masks).mode()
    return float((chosen == wanted).float().mean())


def write_checkpoint(path: Path, model: MaskablePPO, more: Mapping[str, Any]) -> None:
    """Save the training state as tensors and numbers, readable without unpickling.

    Args:
        path: path of the file.
        model: model in training.
        more: further state, tensors and numbers.
    """
    state = {"parameters": model.get_parameters(), "timesteps": model.num_timesteps, "more": dict(more)}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: Path, model: MaskablePPO) -> Any:
    """Restore a checkpoint into a model with the same settings; return the further state.

    Raises:
        RunFolderError: it is damaged, or has other settings.
    """
    try:
        state = load_archive(path)
        model.set_parameters(state["parameters"])
        model.num_timesteps = int(state["timesteps"])
        return state["more"]
    except Exception as error:  # torch raises many types for a damaged file
        reason = first_line(error)
        raise RunFolderError(f"Cannot read checkpoint {path} ({reason}). Delete it to start over.") from error
