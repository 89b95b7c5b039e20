"""PPO training: reproducible, resumable, and able to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rankpilot.agents import training
from rankpilot.agents.config import NetworkConfig, TrainConfig
from rankpilot.agents.learned import LearnedPolicy
from rankpilot.agents.network import RankNetwork
from rankpilot.agents.policy_file import load_policy
from rankpilot.agents.sb3_policy import GroupRolloutBuffer, RankPolicy
from rankpilot.agents.training import CHECKPOINT, PROGRESS, finish, is_finished, train
from rankpilot.env.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.errors import ConfigError, RunFolderError, UnknownNameError
from rankpilot.files import read_json, read_json_lines
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

CONFIG = TrainConfig(
    iterations=2,
    group=2,
    workers=1,
    suites=("planted",),
    task_steps=12,
    validation_tasks=0,
    schedule=DecisionSchedule(probe_steps=4),
    network=NetworkConfig(width=8),
)


def same_weights(left: RankNetwork, right: RankNetwork) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankNetwork, list[tuple[int, int]]]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    reports: list[tuple[int, int]] = []
    network = train(CONFIG, folder, on_decision=lambda done, total: reports.append((done, total)))
    return folder, network, reports


class Killed(Exception):
    pass


def train_until(config: TrainConfig, folder: Path, decisions: int) -> None:
    def kill(done: int, total: int) -> None:
        if done >= decisions:
            raise Killed

    with pytest.raises(Killed):
        train(config, folder, on_decision=kill)


def test_the_run_folder(whole: tuple[Path, RankNetwork, list[tuple[int, int]]]) -> None:
    folder, network, reports = whole
    assert reports == [(count, 16) for count in range(1, 17)]
    rows = read_json_lines(folder / PROGRESS)
    assert len(rows) == 2
    assert read_json(folder / "config.json")["task_steps"] == 12
    assert not is_finished(folder)
    assert not same_weights(network, RankNetwork(CONFIG.network))
    assert not network.training


def test_the_same_seed_gives_the_same_policy(
    whole: tuple[Path, RankNetwork, list[tuple[int, int]]], tmp_path: Path
) -> None:
    folder, network, _ = whole
    assert same_weights(network, train(CONFIG, tmp_path / "again"))
    pairs = zip(read_json_lines(folder / PROGRESS), read_json_lines(tmp_path / "again" / PROGRESS), strict=True)
    for left, right in pairs:
        timeless = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in (left, right)]
        assert timeless[0] == timeless[1]
    other = train(dataclasses.replace(CONFIG, seed=1), tmp_path / "other")
    assert not same_weights(network, other)


@pytest.mark.parametrize("killed_at", [3, 8, 9, 13])
def test_killed_and_resumed_is_as_if_nothing_had_happened(
    whole: tuple[Path, RankNetwork, list[tuple[int, int]]], tmp_path: Path, killed_at: int
) -> None:
    """The first iteration ends with decision 8, its update after that."""
    folder = tmp_path / "run"
    train_until(CONFIG, folder, killed_at)
    assert (folder / CHECKPOINT).exists() == (killed_at > 8)
    reports: list[int] = []
    network = train(CONFIG, folder, resume=True, on_decision=lambda done, total: reports.append(done))
    assert same_weights(network, whole[1])
    assert reports[0] == (9 if killed_at > 8 else 1)
    assert len(read_json_lines(folder / PROGRESS)) == 2
    assert [row["iteration"] for row in read_json_lines(folder / PROGRESS)] == [
        row["iteration"] for row in read_json_lines(whole[0] / PROGRESS)
    ]


def test_killed_between_progress_and_checkpoint(
    whole: tuple[Path, RankNetwork, list[tuple[int, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write_checkpoint", kill)
        with pytest.raises(Killed):
            train(CONFIG, tmp_path / "run")
    assert len(read_json_lines(tmp_path / "run" / PROGRESS)) == 1
    assert same_weights(train(CONFIG, tmp_path / "run", resume=True), whole[1])
    assert [row["iteration"] for row in read_json_lines(tmp_path / "run" / PROGRESS)] == [1, 2]


def test_a_finished_training_resumes_to_itself(
    whole: tuple[Path, RankNetwork, list[tuple[int, int]]], make_observation: Callable[..., Any]
) -> None:
    folder, network, _ = whole
    again = train(CONFIG, folder, resume=True, on_decision=lambda *_: pytest.fail("trains again"))
    assert same_weights(again, network)
    finish(folder, network, CONFIG, {"learned": {"improvement": 0.1}})
    assert is_finished(folder)
    card = read_json(folder / "card.json")
    assert card["episodes"] == 4
    assert card["validation"] == {"learned": {"improvement": 0.1}}
    loaded = load_policy(folder)
    observation = make_observation(9)
    np.testing.assert_array_equal(
        loaded.decide(observation).scores, LearnedPolicy("x", network).decide(observation).scores
    )


def test_run_folders_are_never_overwritten(whole: tuple[Path, RankNetwork, Any], tmp_path: Path) -> None:
    folder = whole[0]
    with pytest.raises(RunFolderError, match=r"exists already\. Pass --resume"):
        train(CONFIG, folder)
    with pytest.raises(RunFolderError, match=r"other settings \(learning_rate: 0.003 there, 0.1 now\)"):
        train(dataclasses.replace(CONFIG, learning_rate=0.1), folder, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run of rankpilot's"):
        train(CONFIG, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "other keys"])
def test_a_corrupt_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    train_until(CONFIG, folder, 9)
    path = folder / CHECKPOINT
    trap = tmp_path / "ran"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other keys":
        state = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in state.items() if key != "numpy_rng"}, path)
    else:
        torch.save(_Payload(trap), path)
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt cannot be read"):
        train(CONFIG, folder, resume=True)
    assert not trap.exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_bad_settings(tmp_path: Path) -> None:
    for options in ({"iterations": 0}, {"group": 1}, {"epochs": 0}, {"task_steps": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            TrainConfig(**options)
    for options in ({"workers": -1}, {"validation_tasks": -1}, {"learning_rate": 0.0}):
        with pytest.raises(ConfigError, match="at least 0"):
            TrainConfig(**options)
    with pytest.raises(UnknownNameError):
        train(dataclasses.replace(CONFIG, suites=("shfit",)), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before anything is written"


# The plumbing learns -----------------------------------------------------------------------------------------------


class Toy(gym.Env[dict[str, Any], Any]):
    """One decision whose best action is known: scores as the module's height, and a floor shift of 1."""

    def __init__(self, modules: int = 4) -> None:
        self.modules = modules
        self.observation_space = spaces.Dict(
            {
                "module_features": spaces.Box(-3, 3, (modules * len(MODULE_FEATURES),), np.float32),
                "run_features": spaces.Box(-3, 3, (len(RUN_FEATURES),), np.float32),
                "mask": spaces.MultiBinary(modules),
            }
        )
        self.action_space = spaces.Box(-4, 4, (modules + 1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        features = np.zeros((self.modules, len(MODULE_FEATURES)), dtype=np.float32)
        self.height = np.linspace(0, 1, self.modules, dtype=np.float32)
        features[:, MODULE_FEATURES.index("height")] = self.height
        mask = np.ones(self.modules, dtype=np.int8)
        run = np.zeros(len(RUN_FEATURES), dtype=np.float32)
        self.observed = {"module_features": features.reshape(-1), "run_features": run, "mask": mask}
        return self.observed, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        miss = float(np.square(action[:-1] - self.height).mean() + np.square(action[-1] - 1))
        # A large offset that no action can change: what the group's mean must take away.
        return self.observed, 100.0 - miss, True, False, {}


def test_the_plumbing_learns_a_known_optimum() -> None:
    torch.manual_seed(0)
    envs = DummyVecEnv([Toy, Toy])
    model = PPO(
        RankPolicy,
        envs,
        n_steps=32,
        batch_size=64,
        n_epochs=6,
        learning_rate=1e-2,
        gamma=1.0,
        gae_lambda=1.0,
        vf_coef=0.1,
        rollout_buffer_class=GroupRolloutBuffer,
        policy_kwargs={"network": NetworkConfig(width=16)},
        seed=0,
        device="cpu",
    )
    observation, _ = Toy().reset()

    def miss() -> tuple[float, float]:
        action, _ = model.predict(observation, deterministic=True)
        return float(np.abs(action[:-1] - np.linspace(0, 1, 4)).max()), float(abs(action[-1] - 1))

    assert miss() == pytest.approx((1.0, 1.0)), "it starts at zero"
    model.learn(64 * 60)
    scores, floor = miss()
    assert scores < 0.25
    assert floor < 0.25
