"""The whole chain but the training of adapters: environment, decoder, plan, PPO. The loss has a closed form.

Module m is worth w_m log(1 + rank_m), so the best ranks are proportional to the worth, which one of the signals shows.
A policy starts with one sixth of that: it has to learn to follow the signal, and reach what `best_plan` reaches.
"""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rankpilot.agents.learned.config import NetworkConfig
from rankpilot.agents.training.ppo_policy import GroupRolloutBuffer, RankPolicy
from rankpilot.bench.training.closed_form import SCHEDULE, TASKS, ClosedForm, Episode, reached, reference_of
from rankpilot.env import rank_allocation
from rankpilot.env.rank_allocation import RankAllocationEnv
from rankpilot.env.score_actions import ScoreActions
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

GROUP, GROUPS, EPISODES = 8, 4, 2


class Env(RankAllocationEnv):
    """Draws the same tasks as its neighbours of the group."""

    def __init__(self, group: int) -> None:
        super().__init__(task=ClosedForm(0), schedule=SCHEDULE)  # type: ignore[arg-type]
        self._draws = np.random.default_rng(group)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        gym.Env.reset(self, seed=seed)
        self._task = ClosedForm(int(self._draws.integers(TASKS)))
        return super().reset(options={"task": self._task})


def make_env(group: int) -> ScoreActions:
    return ScoreActions(Env(group))


@pytest.mark.slow
def test_ppo_reaches_a_known_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_allocation, "Episode", Episode)
    monkeypatch.setattr(rank_allocation, "reference_of", reference_of)
    torch.manual_seed(0)
    model = PPO(
        RankPolicy,
        DummyVecEnv([functools.partial(make_env, slot // GROUP) for slot in range(GROUPS * GROUP)]),
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
    before = reached(model.policy.network)
    assert before < 0.6
    model.learn(EPISODES * GROUPS * GROUP * 60)
    assert reached(model.policy.network) > 0.9
