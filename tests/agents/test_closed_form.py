"""The whole chain but the training of adapters: environment, decoder, plan, PPO. The loss has a closed form.

Module m is worth w_m log(1 + rank_m), so the best ranks are proportional to the worth, which one of the signals shows.
A policy starts with one sixth of that: it has to learn to follow the signal, and reach what `best_plan` reaches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rankpilot.agents.config import NetworkConfig
from rankpilot.agents.learned import LearnedPolicy
from rankpilot.agents.sb3_policy import GroupRolloutBuffer, RankPolicy
from rankpilot.env import rank_allocation
from rankpilot.env.controller import ProbeResult, RankController, budget_limit
from rankpilot.env.rank_allocation import RankAllocationEnv
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.env.score_actions import ScoreActions
from rankpilot.env.tasks import Reference
from rankpilot.lora.budget import Budget
from rankpilot.lora.cost import ParameterCost
from rankpilot.lora.plan import uniform_ranks
from rankpilot.lora.signals import SIGNALS
from rankpilot.lora.utility import best_plan
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

MODULES = 12
SCHEDULE = DecisionSchedule(fractions=(0.0,))
TASKS, GROUP, GROUPS, EPISODES = 64, 8, 4, 2


@dataclass(frozen=True)
class Target:
    """The shape of a target module."""

    name: str
    block: int
    d_in: int = 64
    d_out: int = 64
    max_rank: int = 64
    rank: int = 1


TARGETS = [Target(f"layers.{index}.proj", index) for index in range(MODULES)]


@dataclass(eq=False)
class Adapters:
    """Ranks, and signals of which the first shows the worth."""

    ranks: Any = field(default_factory=lambda: np.ones(MODULES, dtype=np.int64))
    targets: Any = field(default_factory=lambda: TARGETS)

    def __post_init__(self) -> None:
        self.meter = self
        self.values = np.zeros((MODULES, len(SIGNALS)))
        self.age = np.zeros(MODULES, dtype=np.int64)

    def set_ranks(self, ranks: Any, optimizer: Any, *, seed: int, step: int) -> None:
        self.ranks = ranks

    def non_finite(self, optimizer: Any) -> list[str]:
        return []


@dataclass(frozen=True)
class Task:
    """One set of worths."""

    seed: int
    steps: int = 10
    id: str = "closed form"

    @property
    def worth(self) -> Any:
        return np.exp(np.random.default_rng(self.seed).normal(size=MODULES))

    def adapted(self) -> tuple[None, list[Target]]:
        return None, TARGETS

    def loss(self, ranks: Any) -> float:
        return float(10 - self.worth @ np.log1p(ranks) / self.worth.sum())


class Episode:
    """Stands for a fine-tune."""

    def __init__(self, task: Task, schedule: DecisionSchedule) -> None:
        self.task, self.step = task, 0
        cost = ParameterCost.of(TARGETS)  # type: ignore[arg-type]
        limit = budget_limit(Budget("share", 0.6), cost, np.full(MODULES, 64))
        signals = np.ones((MODULES, len(SIGNALS)))
        signals[:, 0] = task.worth
        result = ProbeResult(signals, 10.0)
        self.controller = RankController(Adapters(), cost, limit, schedule, task.steps, result)

    def observe(self, loss: float | None = None) -> Any:
        return self.controller.observe(self.step, loss)

    def apply(self, deltas: Any, scores: Any) -> None:
        self.controller.apply(deltas, scores, self.step)

    def advance(self) -> float:
        self.step = self.task.steps
        return self.held_out_loss()

    def held_out_loss(self) -> float:
        return self.task.loss(self.controller.ranks)


@functools.cache
def reference_of(task: Task, schedule: DecisionSchedule) -> Reference:
    problem = Episode(task, schedule).controller.problem()
    utility = task.worth[:, None] * np.log1p(problem.ladder.array)
    return Reference(10.0, task.loss(uniform_ranks(problem)), task.loss(best_plan(problem, utility)))


class Env(RankAllocationEnv):
    """Draws the same tasks as its neighbours of the group."""

    def __init__(self, group: int) -> None:
        super().__init__(task=Task(0), schedule=SCHEDULE)  # type: ignore[arg-type]
        self._draws = np.random.default_rng(group)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        gym.Env.reset(self, seed=seed)
        self._task = Task(int(self._draws.integers(TASKS)))
        return super().reset(options={"task": self._task})


def make_env(group: int) -> ScoreActions:
    return ScoreActions(Env(group))


def reached(network: Any) -> float:
    """Mean share of the way from uniform to the optimum, on tasks that were never drawn."""
    policy, shares = LearnedPolicy("learned", network), []
    for seed in range(1000, 1030):
        task = Task(seed)
        episode, reference = Episode(task, SCHEDULE), reference_of(task, SCHEDULE)
        decision = policy.decide(episode.observe())
        episode.apply(decision.deltas, decision.scores)
        assert reference.best is not None
        shares.append((reference.uniform - episode.held_out_loss()) / (reference.uniform - reference.best))
    return float(np.mean(shares))


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
