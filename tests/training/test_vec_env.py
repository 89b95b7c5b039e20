"""The vector environment of Gymnasium as one of Stable-Baselines3, and the example that trains on it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.proxy_task import ProxyTask, Reference
from rankpilot.errors import ConfigError
from rankpilot.training.vec_env import GymnasiumVecEnv

from ..env.conftest import INFO_KEYS

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = "llama-4x32"
SCHEDULE = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.25, 0.4, 0.6))
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_sb3.py"


def make_task(kind: Any = "shift", seed: int = 1, **options: Any) -> ProxyTask:
    sizes: Any = {"base": BASE, "steps": 8, "batch_size": 4, "length": 16, "eval_rows": 16}
    return ProxyTask(kind, seed, **{**sizes, **options})


def make(num_envs: int, **settings: Any) -> GymnasiumVecEnv:
    options = {"base": BASE, "actions": "scores", "schedule": SCHEDULE, **settings}
    mode = "vector_entry_point"
    return GymnasiumVecEnv(gym.make_vec(rankpilot.ENV_ID, num_envs=num_envs, vectorization_mode=mode, **options))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> tuple[ProxyTask, ...]:
    """A few tiny tasks in place of the suites."""
    from rankpilot.env import proxy_task as suites

    reference = Reference(3.0, 2.5, 0.5)
    tasks = tuple(make_task(seed=70 + index, budget=0.6 + 0.02 * index, reference=reference) for index in range(9))
    monkeypatch.setattr(suites, "load_suite", lambda name, split: tasks if name == "shift" else ())
    return tasks


@pytest.mark.parametrize("actions", ["scores", "deltas"])
def test_it_is_the_vector_of_gymnasium(actions: Any) -> None:
    """Whose episodes are compared with single environments in tests/env/test_stacked.py."""
    envs, vector = (make(2, task=make_task("planted", 2), actions=actions) for _ in range(2))
    same = vector.envs
    assert envs.observation_space == same.single_observation_space
    assert envs.action_space == same.single_action_space
    same.action_space.seed(0)
    first, (expected, told) = envs.reset(), same.reset()
    np.testing.assert_equal(first, expected)
    assert all(info["task"] == told["task"][slot] for slot, info in enumerate(envs.reset_infos))
    for turn in range(4):
        action = same.action_space.sample()
        observations, rewards, dones, infos = envs.step(action)
        expected, wanted, terminated, _, told = same.step(action)
        np.testing.assert_equal(observations, expected)
        assert dones.tolist() == terminated.tolist() == [turn == 3] * 2
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(rewards, wanted.astype(np.float32))
        final = told["final_info"] if turn == 3 else told
        for slot, info in enumerate(infos):
            assert {key: info[key] for key in INFO_KEYS} == {key: final[key][slot] for key in INFO_KEYS}
            assert not info["TimeLimit.truncated"]
            assert ("terminal_observation" in info) == (turn == 3)
            if turn == 3:
                np.testing.assert_equal(info["terminal_observation"], told["final_obs"][slot])
    np.testing.assert_equal(observations, first)


def test_seeds_and_options(pool: tuple[ProxyTask, ...]) -> None:
    envs = make(2)

    def names() -> list[str]:
        envs.reset()
        return [info["task"] for info in envs.reset_infos]

    envs.seed(3)
    first, second = names(), names()
    assert first != second
    envs.seed(3)
    assert names() == first
    assert envs.envs.reset(seed=3)[1]["task"].tolist() == first, "both vectors draw alike"
    mine = make_task(seed=99, reference=Reference(3.0, 2.5))
    envs.set_options({"task": mine})
    assert names() == [mine.id] * 2
    assert mine.id not in names(), "options hold for one reset"


def test_refusals() -> None:
    envs = make(2, task=make_task(reference=Reference(3.0, 2.0)))
    with pytest.raises(ConfigError, match="call reset"):
        envs.step(np.zeros((2, 30), dtype=np.float32))
    envs.reset()
    for bad in (np.full((2, 30), np.nan), np.zeros((2, 29))):
        with pytest.raises(ConfigError, match="30 finite numbers"):
            envs.step(bad)
    with pytest.raises(ConfigError, match="share their settings: make a new GymnasiumVecEnv"):
        envs.set_attr("num_envs", 3)
    with pytest.raises(AttributeError, match="no method 'jump'"):
        envs.env_method("jump")
    assert envs.env_is_wrapped(gym.Wrapper) == [False, False]
    assert envs.get_attr("num_envs", [0]) == [2]
    assert envs.step(np.zeros((2, 30), dtype=np.float32))[3][0]["step"] == 2
    envs.close()
    assert envs.envs.closed


def test_vectors_that_reset_late_are_refused() -> None:
    late = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    with pytest.raises(ConfigError, match=r"reset episodes in the same step; this has .*NEXT_STEP"):
        GymnasiumVecEnv(late)


@pytest.mark.long
@pytest.mark.usefixtures("pool")
def test_the_example_trains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "loggers"))
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--updates", "1", "--task-steps", "8", "--base", BASE])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "mean return of the last" in printed
    assert len(EXAMPLE.read_text().splitlines()) < 40
    assert not (tmp_path / "loggers").exists()
