"""Learners of a policy's steering on the closed-form fine-tune: PPO, RLOO and evolution strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from ...agents.learned.config import NetworkConfig
from ...agents.learned.network import RankNetwork
from ...agents.training.ppo_policy import GroupRolloutBuffer, RankPolicy
from ...allocation.policy import decision_from_scores
from ...env.spaces import observation_space, score_space
from .closed_form import MODULES, TASKS, ClosedForm, Episode, reached, share_of, share_reached

GROUPS, GROUP, EPISODES = 4, 8, 2
"""Tasks that are flown side by side, episodes of each, and how often before an update."""

ROUND = GROUPS * GROUP * EPISODES
"""Episodes between updates."""

Learner = Literal["ppo", "rloo", "es"]


@dataclass(frozen=True)
class Setting:
    """One way to learn.

    Attributes:
        learner: PPO; RLOO (Ahmadian et al., 2024, arXiv 2402.14740), one step along the policy gradient with the mean
            of the other episodes of the group as baseline; or ES, evolution strategies (Salimans et al., 2017, arXiv
            1703.03864) with antithetic pairs.
        epochs: passes over the episodes of a round.
        rate: step size of Adam.
        grouped: advantages are relative to the group; or else to the critic.
        network: its size and start.
        sigma: of ES, how far parameters are moved to try them.
    """

    learner: Learner = "ppo"
    epochs: int = 6
    rate: float = 1e-2
    grouped: bool = True
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(width=16))
    sigma: float = 0.1


USUAL = Setting()

SETTINGS: dict[str, Setting] = {
    "ppo": USUAL,
    "ppo, one pass": replace(USUAL, epochs=1),
    "ppo, a critic as baseline": replace(USUAL, grouped=False),
    "ppo, noise of each module's own": replace(USUAL, network=replace(USUAL.network, shared_std=1e-3, score_std=0.3)),
    "ppo, 2 heads of attention": replace(USUAL, network=replace(USUAL.network, attention_heads=2)),
    "rloo": replace(USUAL, learner="rloo", epochs=1),
    "es": replace(USUAL, learner="es", rate=3e-2),
}


@dataclass(frozen=True)
class Piece:
    """One training.

    Attributes:
        name: of the setting.
        seed: of the training.
        rounds: in all.
        told: rounds after which the share is measured.
    """

    name: str
    seed: int
    rounds: int
    told: tuple[int, ...]


class ClosedFormEnv(gym.Env[dict[str, Any], Any]):
    """One decision on scores; the reward is the share of the way to the best ranks.

    Args:
        seed: draws the tasks; environments of a group have the same.
    """

    def __init__(self, seed: Sequence[int]) -> None:
        self.observation_space = observation_space(MODULES)
        self.action_space = score_space(MODULES)
        self._draws = np.random.default_rng(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw the next task."""
        super().reset(seed=seed)
        self._task = ClosedForm(int(self._draws.integers(TASKS)))
        self._episode = Episode(self._task)
        self._seen = self._episode.observe()
        return self._seen.padded(MODULES), {}

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take the decision."""
        decision = decision_from_scores(self._seen, action[:-2].astype(np.float64), action[-2:].astype(np.float64))
        return self._seen.padded(MODULES), share_reached(self._task, self._episode, decision), True, False, {}


class LeaveOneOutBuffer(GroupRolloutBuffer):
    """RLOO's advantages: a return less the mean of the others of its group."""

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """Undiscounted returns, and advantages."""
        super().compute_returns_and_advantage(last_values, dones)
        groups = self.returns.reshape(len(self.returns), -1, self.group)
        centred = (groups - groups.mean(axis=2, keepdims=True)) * self.group / (self.group - 1)
        self.advantages = centred.reshape(self.returns.shape).astype(np.float32)


class _Measuring(BaseCallback):
    """Measures the network after some of the updates."""

    def __init__(self, told: Sequence[int]) -> None:
        super().__init__()
        self.shares: dict[int, float] = {}
        self._told, self._updates = told, -1

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._updates += 1
        self._measure()

    def _on_training_end(self) -> None:
        self._updates += 1
        self._measure()

    def _measure(self) -> None:
        if self._updates in self._told:
            self.shares[self._updates] = reached(self.model.policy.network)  # type: ignore[arg-type]


def learn(piece: Piece) -> dict[int, float]:
    """Train once; the share reached after each of the rounds that are told."""
    setting = SETTINGS[piece.name]
    if setting.learner == "es":
        return evolve(setting, piece)
    grouped = LeaveOneOutBuffer if setting.learner == "rloo" else GroupRolloutBuffer
    measuring = _Measuring(piece.told)
    model = PPO(
        RankPolicy,
        DummyVecEnv([partial(ClosedFormEnv, [piece.seed, slot // GROUP]) for slot in range(GROUPS * GROUP)]),
        n_steps=EPISODES,
        batch_size=ROUND,
        n_epochs=setting.epochs,
        learning_rate=setting.rate,
        gamma=1.0,
        gae_lambda=1.0,
        vf_coef=0.1,
        normalize_advantage=setting.learner == "ppo",
        rollout_buffer_class=grouped if setting.grouped else DictRolloutBuffer,
        rollout_buffer_kwargs={"group": GROUP} if setting.grouped else {},
        policy_kwargs={"network": setting.network},
        seed=piece.seed,
        device="cpu",
    )
    model.policy.network.freeze_estimate()  # type: ignore[operator, union-attr]
    model.learn(ROUND * piece.rounds, callback=measuring)
    return measuring.shares


@torch.no_grad()
def evolve(setting: Setting, piece: Piece) -> dict[int, float]:
    """ES on what steers the network: each pair of episodes tries a direction and its opposite on one task."""
    torch.manual_seed(piece.seed)
    network = RankNetwork(setting.network)
    network.freeze_estimate()
    placement = [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and "critics" not in name and "std" not in name
    ]
    optimizer = torch.optim.Adam(placement, lr=setting.rate)
    draws = np.random.default_rng(piece.seed)
    shares: dict[int, float] = {}
    for round_ in range(1, piece.rounds + 1):
        tasks = [ClosedForm(int(number)) for number in draws.integers(TASKS, size=GROUPS * EPISODES)]
        tried = [_tried(network, placement, task, setting.sigma) for task in tasks for _ in range(GROUP // 2)]
        differences = torch.tensor([difference for difference, _ in tried])
        directions = [direction for _, direction in tried]
        weights = differences / (differences.std() + 1e-8)
        for place, parameter in enumerate(placement):
            steps = torch.stack([direction[place] for direction in directions])
            parameter.grad = -torch.tensordot(weights, steps, dims=1) / len(weights)
        optimizer.step()
        if round_ in piece.told:
            shares[round_] = reached(network)
    return shares


def _tried(
    network: RankNetwork, placement: Sequence[torch.nn.Parameter], task: ClosedForm, sigma: float
) -> tuple[float, list[torch.Tensor]]:
    """How much more a drawn direction gives than its opposite, and the direction."""
    direction = [torch.randn_like(parameter) for parameter in placement]
    _move(placement, direction, sigma)
    ahead = share_of(network, task)
    _move(placement, direction, -2 * sigma)
    behind = share_of(network, task)
    _move(placement, direction, sigma)
    return ahead - behind, direction


def _move(parameters: Sequence[torch.nn.Parameter], direction: Sequence[torch.Tensor], length: float) -> None:
    for parameter, step in zip(parameters, direction, strict=True):
        parameter.add_(step, alpha=length)
