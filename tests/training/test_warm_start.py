"""The warm start: what is taught, that it is learned, and that the rest stays as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.decide.settings import DecisionSchedule, NetworkConfig
from rankpilot.env.proxy_task import ProxyTask, Reference
from rankpilot.env.rank_allocation import action_space, observation_space
from rankpilot.env.vector import StackedConfig
from rankpilot.training import train as module
from rankpilot.training.task_sampling import FreshTasks
from rankpilot.training.train import EXPONENT, SPAN, ScoreDataset, explore, target_scores, warm_start
from rankpilot.training.vec_env import ProxyVecEnv, RankPolicy

SCHEDULE = DecisionSchedule(probe_steps=6, fractions=(0.0, 0.4))
SIZES: Any = {"base": "llama-4x32", "steps": 8, "batch_size": 4, "length": 16, "eval_rows": 16, "learning_rate": 4e-3}
MODULES = 28
PLANTED = [ProxyTask("planted", seed, reference=Reference(3.0, 2.2), **SIZES) for seed in range(6)]
SHIFT = [ProxyTask("shift", seed, reference=Reference(3.0, 2.2), **SIZES) for seed in range(3)]


@pytest.fixture(scope="module")
def envs() -> Iterator[ProxyVecEnv]:
    stack = StackedConfig(
        4, episodes_per_task=2, actions="scores", against="signal-mean", schedule=SCHEDULE, max_modules=MODULES + 2
    )
    made = ProxyVecEnv(FreshTasks((tuple(PLANTED), tuple(SHIFT)), 2), stack, stacks=1, workers=1)
    yield made
    made.close()


def new_policy() -> RankPolicy:
    torch.manual_seed(0)
    return RankPolicy(
        observation_space(MODULES + 2),
        action_space("scores", MODULES + 2),
        lambda _: 1e-3,
        network=NetworkConfig(width=16),
    )


def seen_on(envs: ProxyVecEnv, tasks: list[ProxyTask]) -> Any:
    """What an untrained policy sees when it explores; the same whenever it is asked."""
    policy, dataset = new_policy(), ScoreDataset()
    torch.manual_seed(1)
    envs.play(tasks, explore(policy), note=dataset.note)
    return {key: torch.from_numpy(np.stack([row[key] for row in dataset.rows])) for key in dataset.rows[0]}, dataset


def centred_error(scores: torch.Tensor, dataset: ScoreDataset) -> float:
    errors = scores[:, :MODULES] - torch.from_numpy(np.stack(dataset.targets))[:, :MODULES]
    return float((errors - errors.mean(dim=1, keepdim=True)).square().mean())


# Targets --------------------------------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    """Half the logarithm of the worth, from the largest one down, as far as SPAN, centred."""
    worth = np.array([1.0, math.exp(-1), math.exp(-2), 1e-5, 0.0])
    expected = np.array([0, -0.5, -1, -2, -2]) + 5.5 / 5
    np.testing.assert_allclose(target_scores(worth), expected)
    assert (EXPONENT, SPAN) == (0.5, 4.0)
    np.testing.assert_allclose(target_scores(1000 * worth), expected, err_msg="the unit does not matter")
    assert not target_scores(np.zeros(3)).any()
    assert target_scores(np.array([0.3])) == 0


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_worth_is_learned_and_what_is_not_known_stays_with_the_rule(
    envs: ProxyVecEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 9)  # more and larger steps, for fewer tasks
    monkeypatch.setattr(module, "PASSES", 150)
    monkeypatch.setattr(module, "RATE", 6e-3)
    seen, dataset = seen_on(envs, PLANTED + SHIFT)
    known = torch.tensor(dataset.known)
    assert (len(known), int(known.sum())) == (2 * 9, 2 * 6)
    policy = new_policy()
    torch.manual_seed(1)
    errors = warm_start(policy, envs, PLANTED + SHIFT, seed=0)
    assert errors["after"] < 0.5 * errors["before"]
    assert errors["after"] < 0.5 * errors["constant"]

    with torch.no_grad():
        before, after = (one.get_distribution(seen).mean for one in (new_policy(), policy))
    rows = [index for index, known_row in enumerate(dataset.known) if known_row]
    known_scores = ScoreDataset(targets=[dataset.targets[index] for index in rows])
    for scores, key in ((before, "before"), (after, "after")):
        assert centred_error(scores[known], known_scores) == pytest.approx(errors[key], rel=1e-3), "as it says itself"
    constant = np.stack(known_scores.targets)[:, :MODULES]
    assert np.square(constant).mean() == pytest.approx(errors["constant"], rel=1e-3)

    moved = (after - before)[:, :MODULES]
    moved = (moved - moved.mean(dim=1, keepdim=True)).square().mean(dim=1)
    assert moved[~known].mean() < 0.2 * moved[known].mean(), "scores stay where nothing is known"
    assert not (after - before)[:, -2:].any(), "floor and depth bias stay the rule's"


def test_critics_and_exploration_are_not_taught(envs: ProxyVecEnv) -> None:
    """They have no part in the scores."""
    policy = new_policy()
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    warm_start(policy, envs, PLANTED[:2], seed=0)
    for name, value in policy.network.state_dict().items():
        same = torch.equal(value, before[name])
        if name.startswith("critics.") or name in ("log_std", "shared_log_std"):
            assert same, name
    assert not torch.equal(policy.network.gains, before["gains"])


def test_where_nothing_is_known_nothing_is_learned(envs: ProxyVecEnv) -> None:
    policy = new_policy()
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    assert warm_start(policy, envs, SHIFT, seed=0) == {}
    assert all(torch.equal(value, before[name]) for name, value in policy.network.state_dict().items())
