"""The Gymnasium environment: the API, determinism, the reward, and what happens when things go wrong."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.observation import MODULE_FEATURES
from rankpilot.decide.policy import decision_from_scores
from rankpilot.decide.rules import find_rule
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.bases import adapted_base, proxy_cost, proxy_memory
from rankpilot.env.episode import Comparison, Episode, reference_of, rule_losses
from rankpilot.env.proxy_finetune import ProxyFineTune, TaskData, known_of, load_task
from rankpilot.env.proxy_task import FRESH_SEEDS, ProxyTask, Reference
from rankpilot.env.rank_allocation import TOP, RankAllocationEnv
from rankpilot.errors import BudgetError, ConfigError, RunFolderError, UnknownNameError, UnsupportedError
from rankpilot.lora.spec import DEFAULT_RANKS
from rankpilot.plan.plan import uniform_ranks
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.env_util import make_vec_env

from .short_tasks import make_task as make_task
from .short_tasks import schedule as schedule

MakeTask = Callable[..., ProxyTask]
MakeEnv = Callable[..., RankAllocationEnv]
Rollout = Callable[..., list[tuple[Any, ...]]]
AssertSame = Callable[..., None]
FORMS = pytest.mark.parametrize("actions", ["deltas", "scores"])


def forget() -> None:
    """Drop everything that is remembered about tasks, so that it has to come out the same again."""
    for cached in (load_task, known_of, proxy_cost, proxy_memory, adapted_base):
        cached.cache_clear()


@pytest.fixture
def make_env(make_task: MakeTask, schedule: DecisionSchedule) -> MakeEnv:
    def make(**options: Any) -> RankAllocationEnv:
        return RankAllocationEnv(**{"task": make_task(), "schedule": schedule, **options})

    return make


@pytest.fixture
def make_pool(make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch) -> MakeEnv:
    """Environments that draw from a few tiny tasks in place of the suites."""
    from rankpilot.env import proxy_task as suites

    pool = tuple(make_task("shift", 50 + index, budget=0.6 + 0.02 * index) for index in range(12))
    monkeypatch.setattr(suites, "load_suite", lambda name, split: pool if name == "shift" else ())

    def make(**options: Any) -> RankAllocationEnv:
        return RankAllocationEnv(**{"schedule": schedule, **options})

    return make


@FORMS
def test_checks_of_gymnasium_and_sb3_have_nothing_to_complain_of(
    make_task: MakeTask, schedule: DecisionSchedule, actions: str
) -> None:
    env = gym.make(rankpilot.ENV_ID, task=make_task(), schedule=schedule, actions=actions, render_mode="ansi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own deprecations
        if actions == "scores":  # both advise to scale actions to 1; ours are log2 ranks on purpose
            warnings.filterwarnings("ignore", message=".*symmetric and normalized.*")
        gymnasium_check(env.unwrapped, skip_render_check=False)
        sb3_check(env, warn=True)


@pytest.mark.filterwarnings("ignore:.*The environment is being initialised with render_mode='rgb_array'")
def test_stable_baselines3_makes_and_trains_either_environment_by_its_name(
    make_task: MakeTask, schedule: DecisionSchedule
) -> None:
    """It asks each for pictures, and does without where that ends in a TypeError."""
    small = {"n_steps": 4, "batch_size": 4, "n_epochs": 1, "device": "cpu"}
    options = {"task": make_task(), "schedule": schedule}
    runs = {"base": "llama-4x32", "lengths": (60,)}
    PPO("MultiInputPolicy", rankpilot.ENV_ID, **small)
    PPO("MlpPolicy", rankpilot.CONTROL_ENV_ID, **small)
    PPO("MultiInputPolicy", make_vec_env(rankpilot.ENV_ID, 1, env_kwargs=options), **small).learn(4)
    PPO("MlpPolicy", make_vec_env(rankpilot.CONTROL_ENV_ID, 1, env_kwargs=runs), **small).learn(4)


def test_same_seed_same_run_even_with_nothing_remembered(
    make_pool: MakeEnv, rollout: Rollout, assert_same: AssertSame
) -> None:
    env = make_pool()
    first = rollout(env, seed=3, episodes=2)
    forget()
    assert_same(first, rollout(make_pool(), seed=3, episodes=2))
    assert first[0][4]["task"] != first[-1][4]["task"], "each episode draws its task"
    other = rollout(env, seed=4)
    assert other[0][4]["task"] != first[0][4]["task"]


def test_envs_that_take_turns_within_episodes_do_not_touch_each_other(
    make_task: MakeTask, schedule: DecisionSchedule, rollout: Rollout, assert_same: AssertSame
) -> None:
    """As a vector of them does, though they share the frozen base."""
    tasks = (make_task(), make_task("planted", 2), make_task(seed=3, steps=12))
    envs = [RankAllocationEnv(task=task, schedule=schedule, render_mode="ansi") for task in tasks]
    alone = [rollout(env, seed=5) for env in envs]
    pictures = [env.render() for env in envs]
    rows: list[list[tuple[Any, ...]]] = []
    for env in envs:
        env.action_space.seed(5)
        observation, info = env.reset(seed=5)
        rows.append([(observation, 0.0, False, False, info)])
    assert len({env.render() for env in envs}) == 3
    while any(not each[-1][2] for each in rows):
        for env, each in zip(envs, rows, strict=True):
            if not each[-1][2]:
                each.append(env.step(env.action_space.sample()))
    for before, each, picture, env in zip(alone, rows, pictures, envs, strict=True):
        assert_same(before, each)
        assert env.render() == picture


def test_pickling(make_pool: MakeEnv, make_env: MakeEnv, rollout: Rollout, assert_same: AssertSame) -> None:
    for env in (make_pool(max_modules=30, split="validation"), make_env()):
        twin = pickle.loads(pickle.dumps(env))  # noqa: S301
        assert twin.max_modules == env.max_modules
        assert_same(rollout(env, seed=6), rollout(twin, seed=6))


def test_observations_are_in_their_space_and_padding_is_zero(make_env: MakeEnv) -> None:
    small, large = make_env(), make_env(max_modules=40)
    actions = np.random.default_rng(0).integers(0, 2 * TOP + 1, size=(4, 40))  # what padding asks for must not matter
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
        *(np.zeros(shape, dtype=np.int64) for shape in (0, 27, (28, 1))),
        *(np.full(28, value) for value in (2 * TOP + 1, -1, TOP + 0.5, np.nan, True, "10")),
        None,
    ],
)
def test_a_wrong_action_is_refused_and_the_episode_goes_on(make_env: MakeEnv, action: Any) -> None:
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=f"28 whole numbers from 0 to {2 * TOP}"):
        env.step(action)
    assert env.step(np.full(28, TOP))[4]["step"] == 2


def test_whole_numbers_of_any_type_are_taken(make_env: MakeEnv) -> None:
    env = make_env()
    seen = []
    for action in (np.full(28, 11), np.full(28, 11.0), [11] * 28, np.full(28, 11, dtype=np.uint8)):
        env.reset(seed=0)
        seen.append(env.step(action)[4]["ranks"])  # type: ignore[arg-type]
    assert len(set(seen)) == 1


@pytest.mark.parametrize("bad", [np.zeros(29), np.full(30, np.nan), np.append(np.zeros(29), np.inf), np.zeros((30, 1))])
def test_wrong_scores_are_refused_and_the_episode_goes_on(make_env: MakeEnv, bad: np.ndarray[Any, Any]) -> None:
    env = make_env(actions="scores")
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="30 finite numbers, rank floor and depth bias last"):
        env.step(bad)
    assert env.step(np.zeros(30, dtype=np.float32))[4]["step"] == 2


def test_scores_out_of_range_are_clipped(make_env: MakeEnv) -> None:
    env, ranks = make_env(actions="scores"), []
    for scale in (4.0, 100.0):
        env.reset(seed=0)
        ranks.append(env.step(scale * np.sign(np.arange(30) - 14.0))[4]["ranks"])
    assert ranks[0] == ranks[1]


@FORMS
def test_no_step_before_reset_or_after_the_end(make_env: MakeEnv, actions: str) -> None:
    env = make_env(actions=actions)
    action = env.action_space.sample()
    with pytest.raises(ConfigError, match="call reset"):
        env.step(action)
    env.reset(seed=0)
    while not env.step(action)[2]:
        pass
    with pytest.raises(ConfigError, match="call reset"):
        env.step(action)


def test_a_loss_that_is_not_finite_ends_the_episode(
    make_env: MakeEnv, rollout: Rollout, info_keys: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    env.reset(seed=0)
    env.step(np.full(28, TOP))
    original = TaskData.train_loss

    def diverged(self: TaskData, model: Any, step: int, rows: int | None = None) -> torch.Tensor:
        return original(self, model, step, rows) * (float("nan") if step == 2 else 1.0)

    monkeypatch.setattr(TaskData, "train_loss", diverged)
    observation, reward, terminated, truncated, info = env.step(np.full(28, 11))
    assert (reward, terminated, truncated, info["non_finite"]) == (-3.0 - info["churn"], True, False, True)
    assert (info["loss"], info["held_out_loss"]) == (None, None)
    assert info["improvement"] == -3.0
    assert set(info) == info_keys
    assert env.observation_space.contains(observation)
    with pytest.raises(ConfigError, match="call reset"):
        env.step(np.full(28, TOP))
    monkeypatch.undo()
    assert not rollout(env, seed=0)[-1][4]["non_finite"], "the next episode is sound"


@pytest.mark.parametrize("kind", ["shift", "planted"])
def test_a_huge_learning_rate_does_not_crash(
    make_env: MakeEnv, make_task: MakeTask, rollout: Rollout, info_keys: set[str], kind: str
) -> None:
    env = make_env(task=make_task(kind, 5, learning_rate=1e30, budget=2.0))
    rows = rollout(env, seed=0)
    last = rows[-1]
    assert last[2]
    assert all(np.isfinite(row[1]) and env.observation_space.contains(row[0]) for row in rows)
    assert set(last[4]) == info_keys
    assert last[4]["non_finite"]
    assert last[1] == -3.0 - last[4]["churn"]
    assert np.isfinite(last[4]["uniform_loss"])
    assert rollout(make_env(), seed=0)[-1][4]["held_out_loss"] < 10, "nothing of it is left in the shared base"


def test_a_held_out_loss_that_is_not_finite_is_a_failed_run(
    make_env: MakeEnv, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(task=make_task(reference=Reference(3.0, 2.0, 1.5)))
    env.reset(seed=0)
    monkeypatch.setattr(TaskData, "held_out_loss", lambda self, model: float("nan"))
    action, terminated = np.full(28, 11), False
    while not terminated:
        _, reward, terminated, _, info = env.step(action)
        action = 2 * TOP - action
    assert reward == -3.0 - info["churn"]
    assert info["improvement"] == -3.0


def test_a_uniform_run_without_a_finite_end_gained_nothing(
    make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, losses = make_task(seed=61), iter([3.0, float("nan")])
    monkeypatch.setattr(TaskData, "held_out_loss", lambda self, model: next(losses))
    assert reference_of(ProxyFineTune(task), schedule) == Reference(3.0, 3.0)


@pytest.mark.parametrize("budget", [0.35, 0.7, 1.05])
def test_the_budget_holds_and_ranks_are_real(
    make_env: MakeEnv, make_task: MakeTask, info_keys: set[str], budget: float
) -> None:
    env = make_env(task=make_task(budget=budget))
    env.action_space.seed(1)
    _, info = env.reset(seed=1)
    assert info["ranks"] == (1,) * 28
    seen, terminated = set(), False
    while not terminated:
        _, _, terminated, _, info = env.step(env.action_space.sample())
        assert info["cost"] <= info["limit"]
        assert set(info) == info_keys
        shapes = [(t.weight_a.shape, t.weight_b.shape) for t in adapted_base("llama-4x32")[1]]
        targets = adapted_base("llama-4x32")[1]
        assert shapes == [((r, t.d_in), (t.d_out, r)) for r, t in zip(info["ranks"], targets, strict=True)]
        seen.add(info["ranks"])
    assert len(seen) > 1, "ranks move"
    assert all(any(ranks) for ranks in seen)


@pytest.mark.parametrize("best", [None, 0.9])
def test_reward_is_the_documented_formula(
    make_env: MakeEnv, make_task: MakeTask, schedule: DecisionSchedule, rollout: Rollout, best: float | None
) -> None:
    for kind in ("shift", "planted"):
        task = make_task(kind)
        known = reference_of(ProxyFineTune(task), schedule)
        if best is not None:  # share of the uniform run's loss that the best known allocation reaches
            task = make_task(kind, reference=Reference(known.initial, known.uniform, best * known.uniform))
        rows = rollout(make_env(task=task), seed=2)
        rungs = np.searchsorted(DEFAULT_RANKS, [row[4]["ranks"] for row in rows], side="right") - 1
        moved = np.abs(np.diff(rungs, axis=0)).mean(axis=1)
        assert moved[1:].min() > 0
        churn = [0.0, *np.cumsum(0.002 * moved[1:])]  # the first plan is free
        assert [row[4]["churn"] for row in rows[1:]] == pytest.approx(churn)
        assert not any(row[1] for row in rows[:-1])
        assert all(row[4]["held_out_loss"] is None for row in rows[:-1])
        info = rows[-1][4]
        model, targets = adapted_base(task.base)
        with model.disable_adapter():
            untrained = load_task(task).held_out_loss(model)
        uniform = info["uniform_loss"]
        gain = max(untrained - uniform, 0.01 * untrained)
        headroom = 0.1 * gain if best is None else max((1 - best) * uniform, 0.05 * gain)
        expected = np.clip((uniform - info["held_out_loss"]) / headroom, -3, 3)
        assert info["improvement"] == pytest.approx(expected, abs=1e-4)
        assert rows[-1][1] == pytest.approx(expected - churn[-1], abs=1e-4)
        assert info["held_out_loss"] == pytest.approx(load_task(task).held_out_loss(model), abs=1e-6)
        assert {row[4]["uniform_loss"] for row in rows} == {known.uniform}
        assert info["other_loss"] == known.uniform
        assert len(targets) == 28


def test_the_uniform_plan_is_the_zero_of_the_reward(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    for task in (make_task(), make_task("planted", 4, budget=0.5)):
        episode = Episode(ProxyFineTune(task), schedule)
        ranks = uniform_ranks(episode.applier.problem())
        loss = episode.run_fixed(ranks)
        reference = reference_of(ProxyFineTune(task), schedule)
        assert Comparison.with_uniform(reference).improvement(loss) == 0.0
        assert episode.applier.problem().fits(ranks)


def test_the_reward_against_a_rule_comes_at_the_end(
    make_env: MakeEnv, make_task: MakeTask, schedule: DecisionSchedule, rollout: Rollout
) -> None:
    rows = rollout(make_env(against="signal-mean"), seed=8)
    for _, reward, _, _, info in rows[:-1]:
        assert (reward, info["improvement"], info["other_loss"]) == (0.0, 0.0, None)
    reward, info = rows[-1][1], rows[-1][4]
    assert reward == info["improvement"] - info["churn"] != info["improvement"]
    loss, initial = rule_losses(ProxyFineTune(make_task()), schedule, "signal-mean")
    assert initial == reference_of(ProxyFineTune(make_task()), schedule).initial
    assert info["other_loss"] == loss != info["uniform_loss"]


def test_a_rule_gains_nothing_over_itself(make_env: MakeEnv) -> None:
    env = make_env(actions="scores", against="signal-mean")
    env.reset(seed=0)
    terminated = False
    while not terminated:
        scores = find_rule("signal-mean").decide(env.observation).scores
        _, reward, terminated, _, info = env.step(np.append(scores, [0.0, 0.0]).astype(np.float32))
    assert info["held_out_loss"] == pytest.approx(info["other_loss"], abs=1e-6)
    assert reward == pytest.approx(-info["churn"], abs=1e-4)


def test_a_rule_that_fails_is_no_measure(make_env: MakeEnv, make_task: MakeTask) -> None:
    env = make_env(task=make_task(learning_rate=1e30, reference=Reference(3.0, 2.0)), against="signal-mean")
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(np.full(28, TOP))
    assert (reward, terminated) == (-3.0, True)
    assert np.isfinite(info["other_loss"])


def test_fresh_seeds_are_of_no_suite(make_pool: MakeEnv, make_task: MakeTask) -> None:
    env = make_pool(fresh_seeds=True, against="signal-mean")
    seeds = [int(env.reset(seed=5 if i == 0 else None)[1]["task"].rpartition("/")[2]) for i in range(3)]
    assert len(set(seeds)) == 3
    assert min(seeds) >= FRESH_SEEDS
    one = make_pool(task=make_task(reference=Reference(3.0, 2.0)), fresh_seeds=True)
    told = [one.reset(seed=5 if i == 0 else None)[1]["uniform_loss"] for i in range(2)]
    assert told[0] != told[1], "against uniform, each is measured"
    assert 2.0 not in told


def test_options_of_reset(make_pool: MakeEnv, make_task: MakeTask) -> None:
    env = make_pool()
    names = [env.reset(seed=9 if i == 0 else None)[1]["task"] for i in range(4)]
    assert len(set(names)) >= 3
    mine = make_task("planted", 77, placement="low")
    assert env.reset(seed=9, options={"task": mine})[1]["task"] == mine.id
    assert env.reset()[1]["task"] == names[0], "a given task draws none"


def test_the_budget_of_one_episode(make_env: MakeEnv, make_task: MakeTask) -> None:
    env = make_env(task=make_task(reference=Reference(3.0, 2.0, 1.0)))
    usual = env.reset()[1]
    tight = env.reset(options={"budget": 0.35})[1]
    assert tight["limit"] == pytest.approx(usual["limit"] * 0.35 / 0.7)
    assert usual["uniform_loss"] == 2.0
    assert tight["uniform_loss"] != 2.0, "the reference is for another budget"
    assert env.step(np.full(28, 2 * TOP))[4]["cost"] <= tight["limit"]
    assert env.reset()[1] == usual, "the next episode has its own budget again"
    other = make_task("planted", 5)
    both = env.reset(options={"task": other, "budget": 0.5})[1]
    assert (both["task"], both["limit"]) == (replace(other, budget=0.5).id, pytest.approx(usual["limit"] * 0.5 / 0.7))
    for options, words in (
        ({"budget": -1.0}, "Budget and learning rate of a task are above 0"),
        ({"bugdet": 0.5}, r"Options of reset are 'task' and 'budget'; got \['bugdet'\]"),
        ({"budget": "50%"}, r"a share of what rank 8 on all modules takes, such as 0\.5; got '50%'"),
        ({"budget": True}, r"a share of what rank 8 on all modules takes, such as 0\.5; got True"),
        ({"task": "x"}, "task is a ProxyTask or an OwnTask; got 'x'"),
        ({"task": 0}, "task is a ProxyTask or an OwnTask; got 0"),
        ({"task": replace(other, base="llama-8x32")}, "has 56 modules, and this environment 28"),
    ):
        with pytest.raises(ConfigError, match=words):
            env.reset(options=options)


def test_overrides_of_drawn_tasks(make_pool: MakeEnv) -> None:
    env = make_pool(task_overrides={"steps": 7, "unit": "parameters"})
    assert {(task.steps, task.unit) for task in env.tasks} == {(7, "parameters")}
    env.reset(seed=1)
    terminated = False
    while not terminated:
        _, _, terminated, _, info = env.step(np.full(28, TOP))
    assert info["step"] == 7
    assert info["limit"] < 30_000, "parameters, not bytes"


def test_a_budget_that_fits_nothing_is_refused(make_env: MakeEnv, make_task: MakeTask) -> None:
    with pytest.raises(BudgetError, match="The smallest that works is"):
        make_env(task=make_task(budget=0.001)).reset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suites": ("shfit",)}, r"suite 'shfit'. Did you mean: 'shift'"),
        ({"suites": "planted"}, r"suites is a tuple of names, such as \('planted',\); got 'planted'"),
        ({"suites": None}, r"suites is a tuple of names, such as \('planted',\); got None"),
        ({"suites": (1,)}, r"suites is a tuple of names, .* got \(1,\)"),
        ({"bases": ("lama-4x32",)}, r"proxy base 'lama-4x32'. Did you mean: 'llama-4x32'"),
        ({"bases": 3}, r"bases is a tuple of names, such as \('llama-4x64',\); got 3"),
        ({"split": "tets"}, r"split 'tets'. Did you mean: 'test'"),
        ({"split": []}, r"split is one of \('train', 'validation', 'test'\); got \[\]"),
        ({"against": None}, "against is 'uniform' or the name of a rule; got None"),
        ({"against": "?"}, "Allowed: 'uniform', 'top-down', "),
        ({"max_modules": 100.5}, r"max_modules is at least \d+, a whole number; got 100.5"),
        ({"max_modules": True}, "a whole number; got True"),
        ({"logs": 5}, "logs is a folder or None; got 5"),
        ({"task": "x"}, "task is a ProxyTask or an OwnTask; got 'x'"),
        ({"schedule": "x"}, r"schedule is a rankpilot\.DecisionSchedule or None; got 'x'"),
        ({"actions": "moves"}, "form of actions 'moves'"),
        ({"render_mode": "human"}, "no render mode 'human'; allowed: 'ansi', None"),
        ({"task_overrides": {"foo": 1}}, "field of ProxyTask 'foo'"),
        ({"task_overrides": {"base": []}}, "task_overrides hold a value of a wrong type"),
        ({"task_overrides": {"steps": "a"}}, "are whole numbers of at least 1, .* got 'a'"),
        ({"task_overrides": [1]}, "task_overrides are a dictionary"),
    ],
)
def test_wrong_arguments(schedule: DecisionSchedule, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError, UnsupportedError), match=words):
        RankAllocationEnv(**{"schedule": schedule, **options})


def test_what_does_not_fit_the_tasks_is_refused(make_env: MakeEnv, make_pool: MakeEnv) -> None:
    for modules in (27, 0):
        with pytest.raises(ConfigError, match="max_modules is at least 28"):
            make_env(max_modules=modules)
    with pytest.raises(ConfigError, match=r"No task of the train split of .* is on \('gpt2-4x32',\)"):
        make_pool(bases=("gpt2-4x32",))


def test_what_is_of_drawn_tasks_is_refused_beside_a_fixed_one(make_env: MakeEnv, make_task: MakeTask) -> None:
    words = r"suites=\('nope',\), split='nonsense', bases=\('llama-4x32',\), task_overrides=\{'steps': 7\} would"
    with pytest.raises(ConfigError, match=words):
        make_env(split="nonsense", suites=("nope",), bases=("llama-4x32",), task_overrides={"steps": 7})
    make_env(split="train", suites=["planted", "shift"])  # as they are by default
    options: dict[str, Any] = {
        "task": make_task(),
        "base": make_task().base,
        "vectorization_mode": "vector_entry_point",
    }
    with pytest.raises(ConfigError, match="so split='test' would have no effect"):
        gym.make_vec(rankpilot.ENV_ID, 1, split="test", **options)


def test_a_folder_in_which_no_log_can_be_made(make_env: MakeEnv, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "at all")
    for name in ("file", "gone", "file/inside"):
        env = make_env(logs=str(tmp_path / name))
        with pytest.raises(RunFolderError, match="No log of an episode can be made in"):
            env.reset(seed=0)


def test_the_id_of_an_earlier_version_names_the_present_one() -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(gym.error.DeprecatedEnv, match=rf"v3 .* is deprecated\. Please use `{rankpilot.ENV_ID}`"):
            make("rankpilot/RankAllocation-v3")


def test_every_episode_writes_its_log(make_env: MakeEnv, tmp_path: Path) -> None:
    for _ in range(2):
        env = make_env(logs=str(tmp_path))
        _, info = env.reset(seed=0)
        steps, ranks, ended = [], [], False
        while not ended:
            steps.append(info["step"])
            _, _, ended, _, info = env.step(env.action_space.sample())
            ranks.append(list(info["ranks"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episode-00000", "episode-00001"]
    log = DecisionLog(tmp_path / "episode-00001")
    table = log.to_pandas()
    count = len(ranks[0])
    assert table["step"].tolist()[::count] == steps
    assert table["rank_after"].tolist() == [rank for row in ranks for rank in row]
    assert set(table["policy"].tolist()) == {"agent"}
    assert log.logged(0).choice is None


def test_render_as_text(make_env: MakeEnv, make_task: MakeTask) -> None:
    env = make_env(render_mode="ansi")
    assert env.render() is None, "nothing to show before the first reset"
    env.reset(seed=0)
    assert env.render().startswith(f"{make_task().id}\nstep 0 of 8, no plan yet for")
    terminated = False
    while not terminated:
        _, _, terminated, _, info = env.step(np.full(28, 11))
    end = f"held-out loss {info['held_out_loss']:.3f} (uniform {info['uniform_loss']:.3f})"
    assert env.render().splitlines()[1].endswith(end)
    assert make_env().render() is None


def test_score_actions_decode_against_the_present_plans(make_env: MakeEnv) -> None:
    env = make_env(actions="scores")
    env.reset(seed=0)
    action = np.append(np.linspace(-1, 1, 28), [0.5, -0.25]).astype(np.float32)
    observation = env.observation
    assert observation is not None
    decision = decision_from_scores(observation, action[:28].astype(np.float64), (0.5, -0.25))
    assert (decision.rank_floor, decision.depth_bias) == (pytest.approx(16 * 2**0.5), 3.75)
    info = env.step(action)[4]
    assert info["ranks"] == tuple(decision.ranks.tolist()), "what scores ask for fits the budget already"


def test_ppo_of_sb3_runs_on_the_plain_env(make_env: MakeEnv) -> None:
    model = PPO("MultiInputPolicy", make_env(), n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(8)
    assert model.num_timesteps == 8
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


# Vectors of Gymnasium -------------------------------------------------------------------------------------------------


def test_a_vector_of_copies(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    """Each copy goes through the episode that it would go through alone, though all share a frozen base."""
    given: dict[str, Any] = {"task": make_task(), "schedule": schedule}
    envs = gym.make_vec(rankpilot.ENV_ID, num_envs=2, vectorization_mode="sync", **given)
    alone = RankAllocationEnv(**given)
    actions = np.random.default_rng(0).integers(0, 2 * TOP + 1, size=(4, 2, 28))
    envs.reset(seed=0)
    steps = [envs.step(action) for action in actions]
    for copy in range(2):
        alone.reset(seed=0)
        for action, (observations, rewards, terminated, _, infos) in zip(actions[:, copy], steps, strict=True):
            observation, reward, ended, _, info = alone.step(action)
            assert (rewards[copy], terminated[copy], infos["loss"][copy]) == (reward, ended, info["loss"])
            for key, value in observation.items():
                np.testing.assert_array_equal(observations[key][copy], value)
    envs.close()
