"""PPO on a fine-tune whose best ranks are known: environment, decoder, plan and budget are real, the loss is not.

A policy starts with one sixth of the right weight on the signal that shows the worth: it has to learn to follow the
signal, and comes near what `best_plan` reaches.
"""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rankpilot.decide.policy import decision_from_plan
from rankpilot.decide.settings import NetworkConfig
from rankpilot.env import rank_allocation
from rankpilot.env.rank_allocation import RankAllocationEnv
from rankpilot.plan.plan import uniform_ranks
from rankpilot.plan.problem import best_plan
from rankpilot.training.vec_env import GroupRolloutBuffer, RankPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from .closed_form import SCHEDULE, TRAINING_TASKS, ClosedForm, Episode, mean_share_reached, reference_of, share_reached

GROUP, GROUPS, EPISODES, ROUNDS = 8, 4, 2, 10


class Env(RankAllocationEnv):
    """Draws the same tasks as its neighbours of the group."""

    def __init__(self, group: int) -> None:
        super().__init__(task=ClosedForm(0), schedule=SCHEDULE, actions="scores")  # type: ignore[arg-type]
        self._draws = np.random.default_rng(group)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        gym.Env.reset(self, seed=seed)
        return super().reset(options={"task": ClosedForm(int(self._draws.integers(TRAINING_TASKS)))})


def test_ppo_reaches_a_known_optimum(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(rank_allocation, "Episode", Episode)
    monkeypatch.setattr(rank_allocation, "reference_of", reference_of)
    torch.manual_seed(0)
    model = PPO(
        RankPolicy,
        DummyVecEnv([functools.partial(Env, slot // GROUP) for slot in range(GROUPS * GROUP)]),
        n_steps=EPISODES,
        batch_size=EPISODES * GROUPS * GROUP,
        n_epochs=6,
        learning_rate=1e-2,
        gamma=1.0,
        gae_lambda=1.0,
        vf_coef=0.1,
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={"group": GROUP},
        policy_kwargs={"network": NetworkConfig(width=16)},
        seed=0,
        device="cpu",
    )
    network = model.policy.network
    network.freeze_estimate()  # as in training
    before = mean_share_reached(network)
    assert before < 0.6
    model.learn(EPISODES * GROUPS * GROUP * ROUNDS)
    assert mean_share_reached(network) > 0.9


def test_shares_of_known_plans() -> None:
    """Uniform rank is 0, the best ranks are 1, and none of their permutations is better."""
    task = ClosedForm(3)
    problem = Episode(task).applier.problem()
    best = best_plan(problem, task.worth[:, None] * np.log1p(problem.ladder.array))
    generator = np.random.default_rng(0)
    for ranks, share in ((uniform_ranks(problem), 0.0), (best, 1.0)):
        episode = Episode(task)
        reached = share_reached(task, episode, decision_from_plan(ranks))
        assert share - 1e-6 <= reached < share + 0.1, "`project` spends what a plan leaves"
    for _ in range(20):
        episode = Episode(task)
        ranks = generator.permutation(best)
        assert share_reached(task, episode, decision_from_plan(ranks)) <= 1.001
