"""The network of an agent in MaskablePPO: any number of groups, what it flies with, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rankpilot.agents.policy_file import GroupNetwork, LearnedPolicy, NetworkConfig, load_policy
from rankpilot.agents.sb3_policy import GroupPolicy
from rankpilot.common.errors import ConfigError, RunFolderError
from rankpilot.common.files import read_json, read_json_lines
from rankpilot.decide.groups import DOUBLE, GROUP_FEATURES, HALVE, STEERING, GroupView
from rankpilot.decide.observation import RUN_FEATURES, Observation
from rankpilot.env.fine_tune import ACTIONS, MOST_GROUPS, observation_space, padded, padded_mask
from rankpilot.env.tasks import Split
from rankpilot.train_agent import Train, train
from sb3_contrib import MaskablePPO

MakeObservation = Callable[..., Observation]


class ClosedForm(gym.Env[Any, int]):
    """A fine-tune in closed form: the log loss rises with the square of the distance of the rate from the best one.

    The alignment tells on which side the rate is; ranks change nothing.
    """

    def __init__(self) -> None:
        self.observation_space, self.action_space = observation_space(), spaces.Discrete(ACTIONS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.off, self.left = float(self.np_random.integers(-3, 4)), 4
        return self.seen(), {}

    def seen(self) -> Any:
        groups = np.zeros(MOST_GROUPS * len(GROUP_FEATURES), np.float32)
        present, run = np.zeros(MOST_GROUPS, np.int8), np.zeros(len(RUN_FEATURES), np.float32)
        present[:6], run[RUN_FEATURES.index("steps_alignment")] = 1, -self.off
        return {"groups": groups, "present": present, "run": run}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.off += {HALVE: -1, DOUBLE: 1}.get(action, 0)
        self.left -= 1
        return self.seen(), -(self.off**2) if not self.left else 0.0, not self.left, False, {}

    def action_masks(self) -> Any:
        mask = np.zeros(ACTIONS, dtype=np.bool_)
        mask[:10] = True
        return mask


@pytest.mark.long
def test_it_solves_a_fine_tune_in_closed_form() -> None:
    """Of what the best policy gains over leaving the rate alone, 90 % at least."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"n_steps": 256, "batch_size": 128, "gamma": 1.0, "learning_rate": 3e-3, "seed": 0}
    model = MaskablePPO(GroupPolicy, ClosedForm(), **options, ent_coef=0.005, policy_kwargs={"width": 16})
    model.learn(12_000)
    env, ends = ClosedForm(), []
    for start in range(-3, 4):
        seen, _ = env.reset(seed=0)
        env.off, over = float(start), False
        seen = env.seen()
        while not over:
            action, _ = model.predict(seen, deterministic=True, action_masks=env.action_masks())
            seen, reward, over, _, _ = env.step(int(action))
        ends.append(reward)
    assert np.mean(ends) >= -0.1 * np.mean([start**2 for start in range(-3, 4)])


def network(seed: int = 0) -> GroupNetwork:
    torch.manual_seed(seed)
    return GroupNetwork(NetworkConfig(width=8)).eval()


def test_groups_that_are_not_there_change_nothing_and_their_order_only_the_order() -> None:
    torch.manual_seed(1)
    groups, run = torch.randn(2, 5, len(GROUP_FEATURES)), torch.randn(2, len(RUN_FEATURES))
    scores, values = network()(groups, torch.ones(2, 5), run)
    more = torch.cat([groups, torch.randn(2, 3, len(GROUP_FEATURES))], dim=1)
    present = torch.tensor([[1.0] * 5 + [0.0] * 3] * 2)
    wider, same = network()(more, present, run)
    torch.testing.assert_close(values, same)
    torch.testing.assert_close(scores[:, :9], wider[:, :9])
    order = torch.randperm(5)
    moved, value = network()(groups[:, order], torch.ones(2, 5), run)
    torch.testing.assert_close(value, values)
    torch.testing.assert_close(moved[:, 4:9], scores[:, 4:9][:, order])


@pytest.mark.parametrize("modules", [8, 24, 72])
def test_what_is_trained_and_what_flies_take_the_same_actions(make_observation: MakeObservation, modules: int) -> None:
    model = MaskablePPO(GroupPolicy, ClosedForm(), policy_kwargs={"width": 8})
    policy: Any = model.policy
    flies = LearnedPolicy("agent", policy.network, STEERING)
    for seed, step in [(0, None), (1, 2), (2, 2)]:
        view = GroupView.of(make_observation(modules, seed, max_step=step))
        arrays, mask = padded(view), padded_mask(view)
        action, _ = model.predict(arrays, deterministic=True, action_masks=mask)
        assert int(action) == flies.act(view)


OPTIONS: dict[str, Any] = {
    "warm_rounds": 1, "stacks": 1, "episodes": 8, "steps": 25, "workers": 1, "width": 8, "validation_tasks": 1,
    "validate_every": 2,
}  # fmt: skip


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One base, two texts, and few held-out rows."""
    split = Split(("bert-4x32",), ("code", "tables"), ("sentiment",), 0)
    for module in ("tasks", "fine_tune", "evaluate"):
        monkeypatch.setattr(f"rankpilot.env.{module}.SPLITS", {"train": split})
    monkeypatch.setattr("rankpilot.env.tasks.LENGTHS", (25,))


@pytest.mark.usefixtures("_small", "one_thread")
def test_a_training_from_end_to_end(tmp_path: Path) -> None:
    told: list[str] = []
    folder = train(Train(output=tmp_path / "policy", rounds=1, **OPTIONS), told.append)
    rows = read_json_lines(folder / "progress.jsonl")
    assert [row["round"] for row in rows] == [0, 1]
    assert rows[1]["train/n_updates"] == 4, "of its own update, with four epochs"
    assert len(told) == 2
    assert read_json(folder / "card.json")["above_rule"] == rows[0]["validation"]
    policy = load_policy(folder)
    assert isinstance(policy, LearnedPolicy)
    assert policy.schedule == STEERING
    card = (folder / "card.json").read_bytes()
    assert train(Train(output=folder, rounds=1, resume=True, **OPTIONS), told.append) == folder, "it has ended"
    assert (folder / "card.json").read_bytes() == card
    assert len(told) == 3, "and says so"
    train(Train(output=folder, rounds=2, resume=True, **OPTIONS))
    assert [row["round"] for row in read_json_lines(folder / "progress.jsonl")] == [0, 1, 2]
    assert read_json(folder / "card.json")["rounds"] == 2
    with pytest.raises(RunFolderError, match="--resume"):
        train(Train(output=folder, rounds=1, **OPTIONS))


@pytest.mark.long
@pytest.mark.usefixtures("_small", "one_thread")
def test_a_training_that_was_interrupted_or_made_longer_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Train(output=tmp_path / "parts", rounds=3, **OPTIONS), stop)
    parts = load_policy(train(Train(output=tmp_path / "parts", rounds=3, resume=True, **OPTIONS)))
    train(Train(output=tmp_path / "whole", rounds=2, **OPTIONS))
    whole = load_policy(train(Train(output=tmp_path / "whole", rounds=3, resume=True, **OPTIONS)))
    assert isinstance(parts, LearnedPolicy)
    assert isinstance(whole, LearnedPolicy)
    for name, value in parts.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[name])


def test_widths_that_no_network_has() -> None:
    for width in (0, 2.5, 10**9):
        with pytest.raises(ConfigError, match="width of a network"):
            NetworkConfig(width=width)  # type: ignore[arg-type]
