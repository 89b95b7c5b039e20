"""Controllers are trained from a rule on, by PPO and DQN, and are what Stable-Baselines3's networks are."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.decide.rate_control import CHANGES, FEATURES, RATE_CONTROLS
from rankpilot.env.run_control import RunControlVectorEnv
from rankpilot.errors import DataError
from rankpilot.training.vec_env import GymnasiumVecEnv

from benchmarks import learned_control as control
from benchmarks.learned_control import (
    DECISIONS,
    ControlConfig,
    LearnedRateControl,
    Steps,
    applier_of,
    imitate,
    rule_steps,
    train_rate_control,
)

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
    assert applier_of(model).act(seen) == actions.tolist()


def test_a_policy_learns_to_do_what_was_done(vector: GymnasiumVecEnv) -> None:
    model = control._ppo(ControlConfig(**SMALL), vector)
    seen = np.random.default_rng(1).normal(size=(300, len(FEATURES)))
    actions = np.where(seen[:, 0] > 0, CHANGES.index(1.0), CHANGES.index(-1.0))
    assert imitate(model.policy, seen, actions) > 0.9


def test_rounds_of_the_rule_hold_what_was_seen_and_done() -> None:
    env = RunControlVectorEnv(2, base="llama-4x32", lengths=(60,))
    found = list(rule_steps(env, RATE_CONTROLS["alignment"], 0.0, np.random.default_rng(0), 3))
    assert len(found) == DECISIONS
    for earlier, later in pairwise(found):
        assert earlier.after.tolist() == later.seen.tolist()
        assert (earlier.rewards == 0).all()
        assert (earlier.taken == earlier.ruled).all()
    assert found[-1].ended.all()
    drawn = rule_steps(env, RATE_CONTROLS["leave alone"], 1.0, np.random.default_rng(0), 3)
    assert any((each.taken != each.ruled).any() for each in drawn)


def test_values_reach_the_first_decision_before_training(vector: GymnasiumVecEnv) -> None:
    """Runs of eight decisions that end with 1 are worth 1 from the first decision on."""
    model, size = control._dqn(ControlConfig(**SMALL), vector), len(FEATURES)
    seen = np.eye(DECISIONS + 1, size).repeat(2, axis=0).reshape(-1, 2, size) * 3
    taken, last = np.zeros(2, dtype=int), DECISIONS - 1
    steps = [
        Steps(seen[n], seen[n + 1], taken, taken, np.full(2, float(n == last)), np.full(2, n == last))
        for n in range(DECISIONS)
    ]
    control._warm(model, steps * 64)
    values = model.q_net(torch.as_tensor(seen[:DECISIONS, 0], dtype=torch.float32))[:, 0]
    np.testing.assert_allclose(values.detach().numpy(), 1, atol=0.1)


def test_rounds_of_the_rule_are_of_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(control, "rule_steps", lambda *arguments: seeds.append(arguments[-1]) or [])
    monkeypatch.setattr(control, "_warm", lambda model, found: None)
    train_rate_control(ControlConfig(**SMALL | {"rounds": 0, "warm_rounds": 3, "seed": 1}))
    assert seeds == [1000, 1002, 1004]


@pytest.mark.parametrize("learner", ["ppo", pytest.param("dqn", marks=pytest.mark.long)])
def test_training_ends_with_a_controller(learner: Any) -> None:
    rounds: list[tuple[int, float]] = []
    found = train_rate_control(ControlConfig(learner, **SMALL), lambda number, _, mean: rounds.append((number, mean)))
    assert [number for number, _ in rounds] == [0]
    assert np.isfinite(rounds[0][1])
    assert found.layers[-1][0].shape == (len(CHANGES), 32)


def network(activation: str = "tanh") -> LearnedRateControl:
    generator = np.random.default_rng(0)
    sizes = [len(FEATURES), 5, len(CHANGES)]
    layers = tuple((generator.normal(size=(out, into)), generator.normal(size=out)) for into, out in pairwise(sizes))
    return LearnedRateControl(layers, activation)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_network_takes_the_highest_score_and_survives_its_file(activation: str) -> None:
    own = network(activation)
    observations = np.random.default_rng(1).normal(size=(20, len(FEATURES)))
    (first, bias), (second, other) = own.layers
    inner = observations @ first.T + bias
    inner = np.tanh(inner) if activation == "tanh" else np.maximum(inner, 0)
    assert own.act(observations) == (inner @ second.T + other).argmax(axis=1).tolist()
    again = LearnedRateControl.from_json(json.loads(json.dumps(own.to_json())))
    assert again.act(observations) == own.act(observations)


def test_a_controller_of_another_version_is_refused() -> None:
    with pytest.raises(DataError, match="no control of schema"):
        LearnedRateControl.from_json(network().to_json() | {"schema": 99})
