"""Controllers are trained from a rule on, by PPO and DQN, and are what Stable-Baselines3's networks are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.control import CHANGES, CONTROLLERS, FEATURES
from rankpilot.env.run_control import RunControlVectorEnv
from rankpilot.errors import RankPilotError
from rankpilot.training import control
from rankpilot.training.control import DECISIONS, ControlConfig, controller_of, imitate, rule_steps, train_controller
from rankpilot.training.vec_env import GymnasiumVecEnv

SMALL: dict[str, Any] = {"bases": ("llama-4x32",), "rounds": 1, "episodes": 2, "warm_rounds": 1, "lengths": (60,)}


@pytest.fixture(scope="module")
def vector() -> GymnasiumVecEnv:
    return GymnasiumVecEnv(RunControlVectorEnv(2, base="llama-4x32", lengths=(60,)))


@pytest.mark.parametrize("make", [control._ppo, control._dqn], ids=["ppo", "dqn"])
def test_a_controller_does_what_its_network_does(vector: GymnasiumVecEnv, make: Any) -> None:
    model = make(ControlConfig(**SMALL), vector)
    seen = np.random.default_rng(0).normal(size=(50, len(FEATURES))).astype(np.float32)
    actions, _ = model.predict(seen, deterministic=True)
    assert len(set(actions.tolist())) > 1
    assert controller_of(model).act(seen) == actions.tolist()


def test_a_policy_learns_to_do_what_was_done(vector: GymnasiumVecEnv) -> None:
    model = control._ppo(ControlConfig(**SMALL), vector)
    seen = np.random.default_rng(1).normal(size=(300, len(FEATURES)))
    actions = np.where(seen[:, 0] > 0, CHANGES.index(1.0), CHANGES.index(-1.0))
    assert imitate(model.policy, seen, actions) > 0.9


def test_rounds_of_the_rule_hold_what_was_seen_and_done() -> None:
    env = RunControlVectorEnv(2, base="llama-4x32", lengths=(60,))
    found = list(rule_steps(env, CONTROLLERS["alignment"], 0.0, np.random.default_rng(0), 3))
    assert len(found) == DECISIONS
    for earlier, later in pairwise(found):
        assert earlier.after.tolist() == later.seen.tolist()
        assert (earlier.rewards == 0).all()
        assert (earlier.taken == earlier.ruled).all()
    assert found[-1].ended.all()
    drawn = rule_steps(env, CONTROLLERS["leave alone"], 1.0, np.random.default_rng(0), 3)
    assert any((each.taken != each.ruled).any() for each in drawn)


@pytest.mark.parametrize("learner", ["ppo", pytest.param("dqn", marks=pytest.mark.long)])
def test_training_ends_with_a_controller(learner: Any) -> None:
    rounds: list[tuple[int, float]] = []
    found = train_controller(ControlConfig(learner, **SMALL), lambda number, _, mean: rounds.append((number, mean)))
    assert [number for number, _ in rounds] == [0]
    assert np.isfinite(rounds[0][1])
    assert found.layers[-1][0].shape == (len(CHANGES), 32)


@pytest.mark.long
def test_training_is_the_same_again() -> None:
    torch.manual_seed(5)  # which counts for nothing
    first, second = (train_controller(ControlConfig(**SMALL)) for _ in range(2))
    for (weight, bias), (other, beside) in zip(first.layers, second.layers, strict=True):
        assert weight.tolist() == other.tolist()
        assert bias.tolist() == beside.tolist()


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"episodes": 1.5}, {"bases": ()}, {"drawn": 2.0}, {"learner": "a2c"}, {"rule": "mine"}]
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(RankPilotError):
        ControlConfig(**SMALL | change)
