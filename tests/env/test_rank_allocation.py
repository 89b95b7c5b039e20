"""The Gymnasium environment: the API, determinism, the reward, and what happens when things go wrong."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from rankpilot.env.episode import Episode, baseline, proxy_cost, proxy_probe
from rankpilot.env.observation import MODULE_FEATURES
from rankpilot.env.rank_allocation import RankAllocationEnv
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.env.score_actions import ScoreActions, decode
from rankpilot.env.tasks import ProxyTask, TaskData, adapted_base, load_task
from rankpilot.errors import ConfigError
from rankpilot.lora.plan import uniform_ranks
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check

MakeTask = Callable[..., ProxyTask]
INFO_KEYS = {
    "task",
    "step",
    "loss",
    "held_out_loss",
    "uniform_loss",
    "cost",
    "limit",
    "ranks",
    "non_finite",
}
OVERRIDES = {"steps": 12, "batch_size": 4, "length": 16, "eval_rows": 16, "corpus": "code"}


def forget() -> None:
    """Drop everything that is remembered about tasks, so that it has to come out the same again."""
    for cached in (load_task, proxy_probe, proxy_cost, baseline, adapted_base):
        cached.cache_clear()


@pytest.fixture
def make_env(make_task: MakeTask, schedule: DecisionSchedule) -> Callable[..., RankAllocationEnv]:
    def make(**options: Any) -> RankAllocationEnv:
        return RankAllocationEnv(**{"task": make_task(), "schedule": schedule, **options})

    return make


def rollout(env: gym.Env[Any, Any], *, seed: int, episodes: int = 1) -> list[tuple[Any, ...]]:
    """Whole episodes of random actions: every (observation, reward, terminated, truncated, info)."""
    env.action_space.seed(seed)
    rows: list[tuple[Any, ...]] = []
    for episode in range(episodes):
        observation, info = env.reset(seed=seed if episode == 0 else None)
        rows.append((observation, 0.0, False, False, info))
        while not rows[-1][2]:
            rows.append(env.step(env.action_space.sample()))
    return rows


def assert_same(left: list[tuple[Any, ...]], right: list[tuple[Any, ...]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for key in a[0]:
            np.testing.assert_array_equal(a[0][key], b[0][key])
        assert a[1:4] == b[1:4]
        np.testing.assert_equal(a[4], b[4])


def test_gymnasium_check_has_nothing_to_complain_of(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    env = gym.make(rankpilot.ENV_ID, task=make_task(), schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own deprecations
        gymnasium_check(env.unwrapped, skip_render_check=False)


@pytest.mark.parametrize("wrap", [lambda env: env, ScoreActions])
def test_sb3_check_has_nothing_to_complain_of(make_env: Callable[..., RankAllocationEnv], wrap: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # Its own networks flatten (modules, features); ours reads them as they are.
        if wrap is ScoreActions:  # SB3 advises to scale actions to 1; ours are log2 ranks on purpose
            warnings.filterwarnings("ignore", message=".*symmetric and normalized Box.*")
        sb3_check(wrap(make_env()), warn=True)


def test_same_seed_same_run_even_with_nothing_remembered(schedule: DecisionSchedule) -> None:
    env = RankAllocationEnv(schedule=schedule, task_overrides=OVERRIDES)
    first = rollout(env, seed=3, episodes=2)
    forget()
    assert_same(first, rollout(RankAllocationEnv(schedule=schedule, task_overrides=OVERRIDES), seed=3, episodes=2))
    assert first[0][4]["task"] != first[-1][4]["task"], "each episode draws its task"
    other = rollout(env, seed=4)
    assert other[0][4]["task"] != first[0][4]["task"]


def test_envs_that_take_turns_do_not_touch_each_other(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    tasks = (make_task(), make_task("planted", 2))
    envs = [RankAllocationEnv(task=task, schedule=schedule) for task in tasks]
    alone = [rollout(env, seed=5) for env in envs]
    for index in (1, 0, 1, 0):
        assert_same(alone[index], rollout(envs[index], seed=5))


def test_pickling(schedule: DecisionSchedule) -> None:
    env = RankAllocationEnv(schedule=schedule, task_overrides=OVERRIDES, max_modules=30)
    twin = pickle.loads(pickle.dumps(env))  # noqa: S301
    assert twin.max_modules == 30
    assert_same(rollout(env, seed=6), rollout(twin, seed=6))


def test_observations_are_in_their_space_and_padding_is_zero(make_env: Callable[..., RankAllocationEnv]) -> None:
    small, large = make_env(), make_env(max_modules=40)
    actions = np.random.default_rng(0).integers(0, 21, size=(4, 40))  # what padding asks for must not matter
    seen = {}
    for env, size in ((small, 28), (large, 40)):
        seen[size] = [env.reset(seed=0)[0], *(env.step(action[:size])[0] for action in actions)]
        assert all(env.observation_space.contains(observation) for observation in seen[size])
        assert {key: value.dtype for key, value in seen[size][-1].items()} == {
            "module_features": np.float32,
            "run_features": np.float32,
            "mask": np.int8,
        }
    for plain, padded in zip(seen[28], seen[40], strict=True):
        width = len(MODULE_FEATURES)
        np.testing.assert_array_equal(padded["module_features"][: 28 * width], plain["module_features"])
        np.testing.assert_array_equal(padded["run_features"], plain["run_features"])
        assert not padded["module_features"][28 * width :].any()
        assert padded["mask"].tolist() == [1] * 28 + [0] * 12
    assert not np.array_equal(seen[28][0]["module_features"], seen[28][3]["module_features"])


@pytest.mark.parametrize(
    "action",
    [
        np.zeros(27, dtype=np.int64),
        np.zeros((28, 1), dtype=np.int64),
        np.full(28, 21),
        np.full(28, -1),
    ],
)
def test_a_wrong_action_is_refused_and_the_episode_goes_on(
    make_env: Callable[..., RankAllocationEnv], action: np.ndarray[Any, Any]
) -> None:
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="28 whole numbers from 0 to 20"):
        env.step(action)
    assert env.step(np.full(28, 10))[4]["step"] == 2


def test_an_empty_action_is_refused(make_env: Callable[..., RankAllocationEnv]) -> None:
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="28 whole numbers"):
        env.step(np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("wrap", [lambda env: env, ScoreActions])
def test_no_step_before_reset_or_after_the_end(make_env: Callable[..., RankAllocationEnv], wrap: Any) -> None:
    env = wrap(make_env())
    action = env.action_space.sample()
    with pytest.raises(ConfigError, match="call reset"):
        env.step(action)
    env.reset(seed=0)
    while not env.step(action)[2]:
        pass
    with pytest.raises(ConfigError, match="call reset"):
        env.step(action)


def test_a_loss_that_is_not_finite_ends_the_episode(
    make_env: Callable[..., RankAllocationEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    env.reset(seed=0)
    env.step(np.full(28, 10))
    original = TaskData.train_loss

    def diverged(self: TaskData, model: Any, step: int, rows: int | None = None) -> torch.Tensor:
        return original(self, model, step, rows) * (float("nan") if step == 3 else 1.0)

    monkeypatch.setattr(TaskData, "train_loss", diverged)
    observation, reward, terminated, truncated, info = env.step(np.full(28, 10))
    assert (reward, terminated, truncated, info["non_finite"]) == (-1.0, True, False, True)
    assert set(info) == INFO_KEYS
    assert env.observation_space.contains(observation)
    with pytest.raises(ConfigError, match="call reset"):
        env.step(np.full(28, 10))
    monkeypatch.undo()
    assert not rollout(env, seed=0)[-1][4]["non_finite"], "the next episode is sound"


def test_a_huge_learning_rate_does_not_crash(
    make_env: Callable[..., RankAllocationEnv], make_task: MakeTask, schedule: DecisionSchedule
) -> None:
    env = make_env(task=make_task(learning_rate=1e6))
    last = rollout(env, seed=0)[-1]
    assert last[2]
    assert -1 <= last[1] <= 1
    assert set(last[4]) == INFO_KEYS
    assert rollout(make_env(), seed=0)[-1][4]["held_out_loss"] < 10, "nothing of it is left in the shared base"


@pytest.mark.parametrize("budget", [0.35, 0.7, 1.05])
def test_the_budget_holds_and_ranks_are_real(
    make_env: Callable[..., RankAllocationEnv], make_task: MakeTask, budget: float
) -> None:
    env = make_env(task=make_task(budget=budget))
    env.action_space.seed(1)
    _, info = env.reset(seed=1)
    assert info["ranks"] == (1,) * 28
    seen, terminated = set(), False
    while not terminated:
        _, _, terminated, _, info = env.step(env.action_space.sample())
        assert info["cost"] <= info["limit"]
        assert set(info) == INFO_KEYS
        shapes = [(t.weight_a.shape, t.weight_b.shape) for t in adapted_base("llama-4x64")[1]]
        targets = adapted_base("llama-4x64")[1]
        assert shapes == [((r, t.d_in), (t.d_out, r)) for r, t in zip(info["ranks"], targets, strict=True)]
        seen.add(info["ranks"])
    assert len(seen) > 1, "ranks move"
    assert all(any(ranks) for ranks in seen)


def test_reward_is_the_documented_formula(make_env: Callable[..., RankAllocationEnv], make_task: MakeTask) -> None:
    for kind in ("shift", "planted"):
        task = make_task(kind)
        env = make_env(task=task)
        rows = rollout(env, seed=2)
        assert [row[1] for row in rows[:-1]] == [0.0] * (len(rows) - 1)
        assert all(row[4]["held_out_loss"] is None and row[4]["uniform_loss"] is None for row in rows[:-1])
        info = rows[-1][4]
        model, targets = adapted_base(task.base)
        with model.disable_adapter():
            untrained = load_task(task).held_out_loss(model)
        expected = (info["uniform_loss"] - info["held_out_loss"]) / (untrained - info["uniform_loss"])
        assert rows[-1][1] == pytest.approx(np.clip(expected, -1, 1), abs=1e-6)
        assert info["held_out_loss"] == pytest.approx(load_task(task).held_out_loss(model), abs=1e-6)
        assert len(targets) == 28


def test_the_uniform_plan_is_the_zero_of_the_reward(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    for task in (make_task(), make_task("planted", 4, budget=0.5)):
        episode = Episode(task, schedule)
        ranks = uniform_ranks(episode.controller.problem())
        loss = episode.run_fixed(ranks)
        assert baseline(task, schedule).improvement(loss) == 0.0
        assert episode.controller.problem().fits(ranks)


def test_options_of_reset(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    env = RankAllocationEnv(schedule=schedule, task_overrides=OVERRIDES)
    names = [env.reset(seed=9 if i == 0 else None)[1]["task"] for i in range(4)]
    assert len(set(names)) == 4
    assert env.reset(seed=9, options={"skip_tasks": 2})[1]["task"] == names[2]
    assert env.reset()[1]["task"] == names[3]
    mine = make_task("planted", 77, placement="low")
    assert env.reset(seed=9, options={"task": mine})[1]["task"] == mine.id
    assert env.reset()[1]["task"] == names[0], "a given task draws none"


def test_episodes_of_a_group_share_their_task(schedule: DecisionSchedule) -> None:
    env = RankAllocationEnv(schedule=schedule, task_overrides=OVERRIDES, episodes_per_task=2)
    names = [env.reset(seed=9 if i == 0 else None)[1]["task"] for i in range(4)]
    assert names[0] == names[1] != names[2] == names[3]


@pytest.mark.parametrize("options", [{"max_modules": 27}, {"episodes_per_task": 0}])
def test_arguments_are_checked(make_env: Callable[..., RankAllocationEnv], options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="max_modules is at least 28"):
        make_env(**options)


def test_render(make_env: Callable[..., RankAllocationEnv]) -> None:
    env = make_env(render_mode="ansi")
    env.reset(seed=0)
    info = env.step(np.full(28, 11))[4]
    text = env.render()
    assert text is not None
    lines = text.splitlines()
    assert lines[0] == "step 2 of 12"
    assert [line.split()[1] for line in lines[1:]] == ["3", "2", "1", "0"]
    assert sum(int(word) for line in lines[1:] for word in line.split()[2:]) == sum(info["ranks"])
    assert make_env().render() is None


def test_score_actions_decode_against_the_present_plans(make_env: Callable[..., RankAllocationEnv]) -> None:
    env = ScoreActions(make_env())
    env.reset(seed=0)
    action = np.append(np.linspace(-1, 1, 28), 0.5).astype(np.float32)
    observation = env.unwrapped.observation
    assert observation is not None
    deltas, floor = decode(observation.problem, action[:28].astype(np.float64), float(action[28]))
    assert floor == pytest.approx(16 * 2**0.5)
    asked = observation.problem.ladder.array[observation.problem.ladder.rung(observation.problem.ranks) + deltas]
    info = env.step(action)[4]
    assert info["ranks"] == tuple(asked.tolist()), "what scores ask for fits the budget already"
    with pytest.raises(ConfigError, match="wraps RankAllocationEnv"):
        ScoreActions(gym.make("CartPole-v1"))


def test_ppo_of_sb3_runs_on_the_plain_env(make_env: Callable[..., RankAllocationEnv]) -> None:
    model = PPO("MultiInputPolicy", make_env(), n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(8)
    assert model.num_timesteps == 8
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
