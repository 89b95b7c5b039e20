"""The environment: what Gymnasium and Stable-Baselines3 ask of one; the vector is its episodes side by side."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
from gymnasium.utils.env_checker import check_env
from rankpilot.common.errors import ConfigError, RankPilotError
from rankpilot.decide.groups import DOUBLE, GO_BACK, GROUP_FEATURES, HALVE, NOTHING
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.observation import MOST_FEATURE, RUN_FEATURES
from rankpilot.env.fine_tune import ACTIONS, MOST_GROUPS, FineTuneEnv, FineTuneVectorEnv
from rankpilot.env.tasks import FineTuneTask
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_checker import check_env as check_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

MakeTask = Callable[..., FineTuneTask]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn tasks of 25 steps."""
    monkeypatch.setattr("rankpilot.env.tasks.LENGTHS", (25,))


def roll(env: gym.Env[Any, Any], seed: int, episodes: int = 1) -> list[Any]:
    """All that an environment tells in some episodes of drawn actions."""
    draw, told = np.random.default_rng(seed), list[Any]()
    for number in range(episodes):
        told.append(env.reset(seed=seed if not number else None))
        over = False
        while not over:
            told.append(env.step(int(draw.integers(ACTIONS))))
            over = told[-1][2]
    return told


def test_checkers_find_nothing(make_task: MakeTask) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated")  # of transformers
        check_env(gym.make(rankpilot.ENV_ID, tasks=[make_task()]).unwrapped)
        check_sb3(gym.make(rankpilot.ENV_ID, tasks=[make_task()]))


ONE_LINERS: list[Callable[[], Any]] = [
    lambda: PPO("MultiInputPolicy", rankpilot.ENV_ID, n_steps=2, batch_size=2),
    lambda: A2C("MultiInputPolicy", rankpilot.ENV_ID, n_steps=2),
    lambda: DQN("MultiInputPolicy", rankpilot.ENV_ID, learning_starts=1, buffer_size=10),
    lambda: MaskablePPO("MultiInputPolicy", rankpilot.ENV_ID, n_steps=2, batch_size=2),
    lambda: RecurrentPPO("MultiInputLstmPolicy", rankpilot.ENV_ID, n_steps=2, batch_size=2),
    lambda: PPO("MultiInputPolicy", make_vec_env(rankpilot.ENV_ID, 2), n_steps=1, batch_size=2),
]


@pytest.mark.parametrize("number", range(len(ONE_LINERS)))
def test_each_algorithm_learns_by_the_id_in_one_line(number: int) -> None:
    assert ONE_LINERS[number]().learn(2).num_timesteps >= 2


@pytest.mark.slow
def test_worker_processes_find_the_environment() -> None:
    spawned: dict[str, Any] = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "spawn"}}
    envs: Any = make_vec_env(rankpilot.ENV_ID, 2, env_kwargs={"base": "llama-4x32"}, **spawned)
    assert envs.reset()["present"].shape == (2, MOST_GROUPS)
    envs.close()


def test_the_manual_tells_the_spaces() -> None:
    env, manual = gym.make(rankpilot.ENV_ID), str(FineTuneEnv.__doc__)
    assert f"Discrete({ACTIONS})" in manual
    most = f"{MOST_FEATURE:.0f}"
    assert f"Box(-{most}, {most}, ({MOST_GROUPS} * {len(GROUP_FEATURES)},))" in manual
    assert f"Box(-{most}, {most}, ({len(RUN_FEATURES)},))" in manual
    assert f"MultiBinary({MOST_GROUPS})" in manual
    assert env.action_space == gym.spaces.Discrete(ACTIONS)


def test_the_manual_tells_each_feature_and_its_range() -> None:
    rows = re.findall(r"^ *\| ([\w-]+) \| .* \| (\S+) (?:to|or) (\S+) \|$", str(FineTuneEnv.__doc__), re.M)
    assert [name for name, _, _ in rows] == [*GROUP_FEATURES, *RUN_FEATURES]
    told = [seen for base in ("llama-4x32", "bert-4x32") for seen, *_ in roll(FineTuneEnv(base=base, steps=60), 0, 2)]
    groups = np.concatenate([each["groups"].reshape(MOST_GROUPS, -1)[each["present"] > 0] for each in told])
    run = np.stack([each["run"] for each in told])
    for (name, low, high), values in zip(rows, [*groups.T, *run.T], strict=True):
        assert float(low) <= values.min() <= values.max() <= float(high), name


def test_the_same_seed_gives_the_same_episodes_also_after_pickling() -> None:
    env = FineTuneEnv(base="llama-4x32")
    first = roll(env, 3)
    np.testing.assert_equal(roll(pickle.loads(pickle.dumps(env)), 3), first)  # noqa: S301
    assert env.reset(seed=4)[1]["task"] != first[0][1]["task"]


def test_a_vector_is_its_episodes_side_by_side() -> None:
    vector = gym.make_vec(rankpilot.ENV_ID, 2, vectorization_mode="vector_entry_point", base="llama-4x32")
    assert isinstance(vector, FineTuneVectorEnv)
    seen, _ = vector.reset(seed=7)
    envs = [FineTuneEnv(base="llama-4x32") for _ in range(2)]
    singles = [env.reset(seed=7 + slot)[0] for slot, env in enumerate(envs)]
    draw, over = np.random.default_rng(0), False
    while not over:
        masks = vector.action_masks()
        np.testing.assert_equal(masks, [env.action_masks() for env in envs])
        for name, values in seen.items():
            np.testing.assert_array_equal(values, [single[name] for single in singles])
        actions = np.array([draw.choice(np.flatnonzero(mask)) for mask in masks])
        seen, rewards, ended, _, infos = vector.step(actions)
        told = [env.step(int(action)) for env, action in zip(envs, actions, strict=True)]
        singles, over = [each[0] for each in told], bool(ended.all())
        assert rewards.tolist() == [each[1] for each in told]
    for slot, single in enumerate(singles):
        np.testing.assert_equal(infos["final_obs"][slot], single)
    assert infos["final_info"]["held_out_loss"].tolist() == [each[4]["held_out_loss"] for each in told]


def test_episodes_of_a_task_share_seed_and_batches_and_the_rule_s_run_is_worth_nothing(make_task: MakeTask) -> None:
    vector = FineTuneVectorEnv(4, episodes_per_task=2, base="llama-4x32", against="union")
    vector.reset(seed=0)
    assert [vector.tasks[slot] for slot in (1, 3)] == [vector.tasks[slot] for slot in (0, 2)]
    assert vector.tasks[0] != vector.tasks[2]
    over = False
    while not over:
        _, rewards, _, over = vector.advance(vector.rule_actions())
    assert rewards.tolist() == [0, 0, 0, 0], "who does what the rule does gets nothing"


def test_episodes_are_drawn_from_the_tasks_that_are_given(make_task: MakeTask) -> None:
    tasks = [make_task(seed=seed, base=base) for base in ("llama-4x32", "bert-4x32") for seed in range(3)]
    vector, seen = FineTuneVectorEnv(4, episodes_per_task=2, tasks=tasks), set[FineTuneTask]()
    for seed in range(8):
        vector.reset(seed=[10 * seed + slot for slot in range(4)])
        assert len({task.base for task in vector.tasks.values()}) == 1
        seen |= set(vector.tasks.values())
    assert seen <= set(tasks)
    assert len(seen) >= 4
    assert len({task.base for task in seen}) == 2


def test_what_is_not_allowed_keeps_all(make_task: MakeTask) -> None:
    env = FineTuneEnv(tasks=[make_task()])

    def end(action: int) -> Any:
        env.reset(seed=0)
        env.step(NOTHING)
        mask, told = env.action_masks(), []
        told.append(env.step(action if not mask[action] else NOTHING)[0])
        return told

    env.reset(seed=0)
    assert env.action_masks()[[NOTHING, HALVE, DOUBLE, GO_BACK]].tolist() == [True, False, False, False]
    forbidden = [DOUBLE, ACTIONS - 1]
    for action in forbidden:
        np.testing.assert_equal(end(action), end(NOTHING))


@pytest.mark.parametrize(
    ("steps", "action", "moved"),
    [(60, HALVE, 0.5), (60, DOUBLE, 2.0), (60, GO_BACK, 0.25), (60, NOTHING, 1.0), (59, DOUBLE, 1.0)],
)
def test_actions_on_the_rate(make_task: MakeTask, steps: int, action: int, moved: float) -> None:
    """A short run shows too little between two decisions."""
    env = FineTuneEnv(tasks=[make_task(steps=steps)])
    rate = env.reset(seed=0)[1]["rate"]
    env.step(NOTHING)
    assert env.step(action)[4]["rate"] == pytest.approx(moved * rate)


def test_actions_on_ranks(make_task: MakeTask) -> None:
    """A group that grows takes from others what does not fit."""
    env = FineTuneEnv(tasks=[make_task(mean_rank=1.0)])
    env.reset(seed=0)
    before = env.step(NOTHING)[4]["ranks"]
    grown = env.step(int(np.flatnonzero(env.action_masks()[4:])[0]) + 4)[4]["ranks"]
    assert (grown > before).any()
    assert (grown < before).any()


def test_episodes_are_logged_in_the_format_of_runs(make_task: MakeTask, tmp_path: Path) -> None:
    env = FineTuneEnv(tasks=[make_task()], logs=tmp_path)
    roll(env, 0, 2)
    logs = sorted(path for path in tmp_path.iterdir() if len(DecisionLog(path)))
    assert [path.name for path in logs] == ["episode-00000", "episode-00001"]
    assert [record.policy for record in DecisionLog(logs[0]).read()] == ["agent"] * 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tset"}, "Did you mean: 'test'"),
        ({"base": "llama-4x31"}, "Did you mean"),
        ({"regime": "rates"}, "Did you mean: 'rate'"),
        ({"steps": 10}, "at least 25 optimizer steps"),
        ({"tasks": [1]}, "A task must be a FineTuneTask"),
        ({"tasks": []}, "tasks must be a list of at least one FineTuneTask"),
        ({"against": "unions"}, "Did you mean: 'union'"),
        ({"episodes_per_task": 0}, "episodes_per_task"),
        ({"bases": "llama-4x32"}, "Did you mean: 'base'"),
        ({"render_mode": "human"}, "render mode"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RankPilotError, match=message):
        FineTuneEnv(**settings)


@pytest.mark.parametrize("actions", [[0], [0, ACTIONS], [0, -1], [0.0, 1.0], [[0], [1]]])
def test_actions_that_there_are_not(make_task: MakeTask, actions: Any) -> None:
    vector = FineTuneVectorEnv(2, tasks=[make_task()])
    with pytest.raises(ConfigError, match="call reset"):
        vector.step(np.array([0, 0]))
    vector.reset(seed=0)
    with pytest.raises(ConfigError, match=f"whole numbers from 0 to {ACTIONS - 1}"):
        vector.step(np.array(actions))
    with pytest.raises(ConfigError, match="no options"):
        vector.reset(options={"task": 1})
