"""Tiny proxy tasks, whole episodes, and one thread for products that are the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.proxy_task import ProxyTask

SIZES = {"base": "llama-4x32", "steps": 12, "batch_size": 4, "length": 16, "eval_rows": 16}
INFO_KEYS = {
    "task",
    "step",
    "loss",
    "held_out_loss",
    "uniform_loss",
    "other_loss",
    "cost",
    "limit",
    "ranks",
    "non_finite",
    "improvement",
    "churn",
}

Row = tuple[dict[str, Any], float, bool, bool, dict[str, Any]]
Rollout = Callable[..., list[Row]]


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Every test of the environment."""


@pytest.fixture(scope="session")
def info_keys() -> set[str]:
    return INFO_KEYS


@pytest.fixture(scope="session")
def schedule() -> DecisionSchedule:
    return DecisionSchedule(probe_steps=4)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., ProxyTask]:
    def make(kind: Any = "shift", seed: int = 1, **options: Any) -> ProxyTask:
        return ProxyTask(kind, seed, **{**SIZES, **options})

    return make


@pytest.fixture(scope="session")
def rollout() -> Rollout:
    """Whole episodes of random actions: every (observation, reward, terminated, truncated, info)."""

    def roll(env: gym.Env[Any, Any], *, seed: int, episodes: int = 1) -> list[Row]:
        env.action_space.seed(seed)
        rows: list[Row] = []
        for episode in range(episodes):
            observation, info = env.reset(seed=seed if episode == 0 else None)
            rows.append((observation, 0.0, False, False, info))
            while not rows[-1][2]:
                rows.append(env.step(env.action_space.sample()))  # type: ignore[arg-type]
        return rows

    return roll


@pytest.fixture(scope="session")
def assert_same() -> Callable[[list[Row], list[Row]], None]:
    """Two lists of steps are equal bit for bit."""

    def check(left: list[Row], right: list[Row]) -> None:
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            for key in a[0]:
                np.testing.assert_array_equal(a[0][key], b[0][key])
            assert a[1:4] == b[1:4]
            np.testing.assert_equal(a[4], b[4])

    return check
