"""Rounds of fresh tasks as a VecEnv: its contract, its rewards, and that processes decide nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rankpilot.agents.evaluation.runs import run_attempts
from rankpilot.agents.rules import find_rule
from rankpilot.agents.rules.by_signal import MEAN_SIGNALS, signal_mean
from rankpilot.agents.training.rewards import rewards_of
from rankpilot.agents.training.rollout_env import ProxyVecEnv
from rankpilot.agents.training.stack_worker import StackState
from rankpilot.agents.training.task_sampling import FRESH_SEEDS, RolloutConfig
from rankpilot.allocation.features import MODULE_FEATURES, RUN_FEATURES
from rankpilot.allocation.observation import Observation
from rankpilot.allocation.policy import Decision, decision_from_scores
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.common.arrays import Arrays
from rankpilot.env.episodes.stacked import StackedEpisodes
from rankpilot.env.proxies.adapted import adapted_base
from rankpilot.env.tasks.finetune import Reference
from rankpilot.env.tasks.oracle import utilities
from rankpilot.env.tasks.proxy_task import ProxyTask
from rankpilot.errors import BudgetError, ConfigError, WorkerError

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.3, 0.6))
SIZES: Any = {"steps": 8, "batch_size": 4, "length": 16, "eval_rows": 8, "learning_rate": 4e-3}
REFERENCE = Reference(3.0, 2.2, 2.0)
MODULES = 28


def task(kind: Any = "planted", seed: int = 0, base: str = "llama-4x32", **options: Any) -> ProxyTask:
    return ProxyTask(kind, seed, base=base, **{**SIZES, "reference": REFERENCE, **options})


PLANTED, SHIFT = (task("planted", 1), task("planted", 2)), (task("shift", 3, budget=0.4), task("shift", 4))


def config(**options: Any) -> RolloutConfig:
    settings: Any = {
        "templates": (PLANTED, SHIFT),
        "stacks": 1,
        "tasks_per_stack": 2,
        "episodes_per_task": 2,
        "schedule": SCHEDULE,
        "workers": 1,
    }
    return RolloutConfig(**{**settings, **options})


def make(**options: Any) -> ProxyVecEnv:
    return ProxyVecEnv(config(**options), find_rule("signal-mean"), MODULES)


@pytest.fixture(scope="module")
def envs() -> Iterator[ProxyVecEnv]:
    made = make()
    yield made
    made.close()


def random_actions(envs: ProxyVecEnv, seed: int) -> NDArray[np.float32]:
    shape = (envs.num_envs, envs.max_modules + 2)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rule_actions(arrays: Arrays) -> NDArray[np.float32]:
    """signal-mean, from the arrays."""
    rows = len(arrays["mask"])
    modules = arrays["module_features"].reshape(rows, -1, len(MODULE_FEATURES))
    scores = 0.5 * modules[..., [MODULE_FEATURES.index(name) for name in MEAN_SIGNALS]].mean(axis=-1)
    return np.concatenate([scores, np.zeros((rows, 2), dtype=np.float32)], axis=1)


def play_round(envs: ProxyVecEnv, round_: int, seed: int = 0) -> list[Any]:
    envs.round = round_
    seen: list[Any] = [envs.reset()]
    for decision in range(envs.decisions):
        seen.append(envs.step(random_actions(envs, seed + decision)))
    return seen


def assert_same(left: Any, right: Any) -> None:
    """Nested observations, rewards and infos are equal bit for bit."""
    np.testing.assert_equal(left, right)


# The contract of VecEnv -----------------------------------------------------------------------------------------------


def test_a_round_from_beginning_to_end(envs: ProxyVecEnv) -> None:
    assert (envs.num_envs, envs.decisions) == (4, 3)
    envs.round = 5
    observations: Any = envs.reset()
    for decision in range(3):
        assert {key: value.shape for key, value in observations.items()} == {
            "module_features": (4, MODULES * len(MODULE_FEATURES)),
            "run_features": (4, len(RUN_FEATURES)),
            "mask": (4, MODULES),
        }
        for slot in range(4):
            own = {key: value[slot] for key, value in observations.items()}
            assert envs.observation_space.contains(own)
        progress = observations["run_features"][:, RUN_FEATURES.index("progress")]
        np.testing.assert_allclose(progress, SCHEDULE.steps(8)[decision] / 8)
        before = envs.round
        observations, rewards, ended, infos = envs.step(random_actions(envs, decision))
        assert rewards.shape == ended.shape == (4,)
        assert rewards.dtype == np.float32
        assert not any(info["TimeLimit.truncated"] for info in infos)
        if decision < 2:
            assert not ended.any()
            assert not rewards.any()
            assert envs.round == before
            assert all("terminal_observation" not in info for info in infos)
    assert ended.all()
    assert rewards.all()
    assert envs.round == 6
    for slot, info in enumerate(infos):
        assert envs.observation_space.contains(info["terminal_observation"])
        assert info["ranks"].shape == (MODULES,)
        assert info["ranks"].any()
        assert not np.array_equal(
            info["terminal_observation"]["module_features"], observations["module_features"][slot]
        ), "the next round has begun"
    np.testing.assert_equal(observations["run_features"][:, RUN_FEATURES.index("progress")], 0)
    fresh = envs.reset()
    assert_same(fresh, observations)


def test_neighbours_share_the_task_until_they_act(envs: ProxyVecEnv) -> None:
    envs.round = 0
    features: Any = envs.reset()
    first = features["module_features"]
    assert_same(first[0], first[1])
    assert_same(first[2], first[3])
    assert not np.array_equal(first[0], first[2])
    later: Any = envs.step(random_actions(envs, 0))[0]
    assert not np.array_equal(later["module_features"][0], later["module_features"][1])


def test_equal_actions_give_equal_rewards(envs: ProxyVecEnv) -> None:
    envs.round = 1
    envs.reset()
    for decision in range(3):
        actions = random_actions(envs, decision)
        actions[1] = actions[0]
        _, rewards, _, _ = envs.step(actions)
    assert rewards[0] == rewards[1]
    assert rewards[2] != rewards[3]


def test_the_rest_of_the_contract(envs: ProxyVecEnv) -> None:
    assert envs.get_attr("render_mode") == [None] * 4
    assert envs.get_attr("round", [0, 2]) == [envs.round] * 2
    assert envs.env_is_wrapped(object) == [False] * 4
    assert envs.env_is_wrapped(object, 1) == [False]
    assert envs.unwrapped is envs
    with pytest.raises(AttributeError):
        envs.get_attr("no_such_thing")
    with pytest.raises(ConfigError, match="make a new ProxyVecEnv"):
        envs.set_attr("round", 3)
    with pytest.raises(AttributeError, match="'render'"):
        envs.env_method("render")
    envs.reset()
    for bad in (np.zeros((4, MODULES)), np.full((4, MODULES + 2), np.nan)):
        with pytest.raises(ConfigError, match="30 finite numbers"):
            envs.step(bad.astype(np.float32))


def test_tasks_of_several_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"same number of steps; got \[8, 9\]"):
        make(templates=((task(), task(steps=9)),))


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_round_and_stack_alone() -> None:
    some = config(tasks_per_stack=3, seed=7)
    assert (
        some.draw(4, 1)
        == some.draw(4, 1)
        == config(tasks_per_stack=3, seed=7, episodes_per_task=5, workers=2).draw(4, 1)
    )
    assert len({tuple(drawn) for drawn in (some.draw(4, 1), some.draw(5, 1), some.draw(4, 0))}) == 3
    assert config(tasks_per_stack=3, seed=8).draw(4, 1) != some.draw(4, 1)


def test_drawn_tasks_are_templates_with_fresh_seeds() -> None:
    drawn = [one for round_ in range(20) for one in config(tasks_per_stack=3).draw(round_, 0)]
    assert len({one.seed for one in drawn}) == len(drawn)
    assert all(one.seed >= FRESH_SEEDS for one in drawn)
    assert {replace(one, seed=0) for one in drawn} == {replace(one, seed=0) for one in (*PLANTED, *SHIFT)}
    assert all(one.reference == REFERENCE for one in drawn)


def test_suites_take_turns() -> None:
    some = config(tasks_per_stack=3)
    for round_ in range(4):
        for stack in range(2):
            kinds = [one.kind for one in some.draw(round_, stack)]
            expected = ["planted", "shift", "planted", "shift"]
            assert kinds == expected[(round_ + stack) % 2 :][:3]


def test_kinds_of_budget_come_equally_often() -> None:
    odd = [replace(PLANTED[0], checkpointing=True), replace(PLANTED[0], priced_rows=32)]
    odd.append(replace(PLANTED[0], unit="parameters"))
    many = [replace(PLANTED[0], budget=0.5 + 0.01 * turn) for turn in range(30)]
    some = config(templates=((*odd, *many),), tasks_per_stack=4)
    drawn = Counter(one.price for round_ in range(100) for one in some.draw(round_, 0))
    assert drawn.keys() == {"bytes", "checkpointed", "large batch", "parameters"}
    assert all(70 <= count <= 130 for count in drawn.values())


def test_a_stack_has_one_base() -> None:
    elsewhere = tuple(replace(one, base="bert-4x32") for one in PLANTED)
    some = config(templates=((*PLANTED, *elsewhere), SHIFT), tasks_per_stack=3)
    drawn = [some.draw(round_, stack) for round_ in range(20) for stack in range(2)]
    assert all(len({one.base for one in own}) == 1 for own in drawn)
    assert {own[0].base for own in drawn} == {"llama-4x32", "bert-4x32"}
    for own in drawn:
        if own[0].base == "bert-4x32":
            assert {one.kind for one in own} == {"planted"}, "the other suite has no task there"


def test_a_suite_of_one_task() -> None:
    drawn = config(templates=((PLANTED[0],),), tasks_per_stack=2).draw(0, 0)
    assert len({one.seed for one in drawn}) == 2
    assert {replace(one, seed=1) for one in drawn} == {PLANTED[0]}


def test_stacks_lie_side_by_side_in_the_order_of_their_numbers() -> None:
    """Modules that exist tell the bases apart."""
    elsewhere = tuple(replace(one, base="bert-4x32") for one in PLANTED)
    some = make(templates=((*PLANTED, *elsewhere),), stacks=3, tasks_per_stack=1)
    counts = {base: len(adapted_base(base)[1]) for base in ("llama-4x32", "bert-4x32")}
    assert len(set(counts.values())) == 2
    found = set()
    for round_ in range(3):
        some.round = round_
        observations: Any = some.reset()
        bases = [some.config.draw(round_, stack)[0].base for stack in range(3)]
        expected = [counts[base] for base in bases for _ in range(2)]
        assert observations["mask"].sum(axis=1).tolist() == expected
        found |= set(bases)
    assert len(found) == 2


# Rewards --------------------------------------------------------------------------------------------------------------


def standing(
    losses: list[float], rule: list[float], initial: list[float], churn: list[float] | None = None
) -> StackState:
    return StackState({}, tuple(losses), tuple(churn or [0.0] * len(losses)), tuple(rule), tuple(initial))


def test_rewards_by_hand() -> None:
    """Headroom is a quarter of what uniform gains on the first task, a tenth on the second."""
    tasks = [task(), task(reference=Reference(2.0, 1.0))]
    ended = standing([2.0, 2.2, 1.5, 1.45], [2.1, 1.5], [3.0, 2.5], [0.0, 0.01, 0.002, 0.0])
    expected = [0.1 / (0.9 / 4), -0.1 / (0.9 / 4) - 0.01, -0.002, 0.05 / 0.1]
    found = rewards_of(ended, tasks)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32


def test_rewards_are_bounded_and_failed_runs_are_at_the_lower_end() -> None:
    losses = [0.1, 2.9, math.nan, math.inf]
    np.testing.assert_allclose(rewards_of(standing(losses, [2.1], [3.0]), [task()]), [3, -3, -3, -3])
    churn = [0.01] * 4
    np.testing.assert_allclose(rewards_of(standing(losses, [2.1], [3.0], churn), [task()]), [2.99, -3.01, -3.01, -3.01])


def test_where_the_rule_failed_the_middle_of_the_others_stands_in() -> None:
    """What it gained sets the scale too."""
    found = rewards_of(standing([2.0, 2.1, math.nan, 2.2], [math.nan], [3.0]), [task()])
    np.testing.assert_allclose(found, [0.1 / (0.9 / 4), 0, -3, -0.1 / (0.9 / 4)], rtol=1e-5, atol=1e-7)
    found = rewards_of(standing([math.nan, math.nan], [math.nan], [3.0]), [task()])
    np.testing.assert_allclose(found, [-3, -3])


def test_a_rule_that_gains_nothing_leaves_a_scale() -> None:
    """One percent of the initial loss at least."""
    found = rewards_of(standing([3.2, 3.1975], [3.2], [3.0]), [task()])
    np.testing.assert_allclose(found, [0, 0.0025 / (0.03 / 4)], rtol=1e-4)


@pytest.mark.parametrize("unit", ["bytes", "parameters"])
@pytest.mark.parametrize("fractions", [(0.0,), (0.0, 0.3, 0.6)], ids=["once", "often"])
def test_whoever_acts_as_the_rule_gets_nothing(unit: Any, fractions: tuple[float, ...]) -> None:
    """The rule flies beside: the same losses, so what is left is the churn."""
    templates = tuple(tuple(replace(one, unit=unit) for one in suite) for suite in (PLANTED, SHIFT))
    some = make(templates=templates, schedule=replace(SCHEDULE, fractions=fractions))
    observations: Any = some.reset()
    for _ in fractions:
        assert some._local is not None
        found = some._local._rollouts[0][0]
        observations, rewards, _, _ = some.step(rule_actions(observations))
    churn = found.churn[: some.num_envs]
    np.testing.assert_allclose(rewards + churn, 0, atol=1e-6)
    assert (max(churn) > 0) == (len(fractions) > 1)
    assert found.losses()[0] == found.losses()[some.num_envs]


def test_a_failed_run_among_others() -> None:
    """Templates that cannot be trained: the rule fails too, and the round goes on to its end."""
    hot = tuple(replace(one, learning_rate=1e30) for one in SHIFT)
    some = make(templates=(PLANTED, hot))
    for _ in range(2):
        seen = play_round(some, 0)
        _, rewards, ended, _ = seen[-1]
        assert ended.all()
        assert np.isfinite(rewards).all()
        np.testing.assert_allclose(rewards[2:], -3, atol=0.1)
        assert (rewards[:2] > -3).any()
        assert all(np.isfinite(value).all() for value in seen[-1][0].values())


# Whole tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steered:
    """signal-mean's scores, with corrections."""

    name: str = "steered"

    def decide(self, observation: Observation) -> Decision:
        return decision_from_scores(observation, 0.5 * signal_mean(observation), (-1.5, -2.0))


def steered_actions(arrays: Arrays) -> NDArray[np.float32]:
    actions = rule_actions(arrays)
    actions[:, -2:] = (-1.5, -2.0)
    return actions


def test_play_runs_whole_tasks(envs: ProxyVecEnv) -> None:
    """More tasks than a stack holds, of two bases, one of which fails."""
    hot = task("shift", 20, learning_rate=1e30)
    tasks = [task("shift", seed, base) for seed, base in enumerate(["llama-4x32", "bert-4x32"] * 4)]
    tasks = [*tasks[:3], hot, *tasks[3:], *(task("planted", seed) for seed in range(5))]
    told: list[tuple[int, int]] = []
    losses = envs.play(tasks, steered_actions, on_progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, len(tasks))
    assert told[-1] == (len(tasks), len(tasks))
    assert told == sorted(set(told))
    assert math.isnan(losses[3])
    assert len(set(losses)) == len(tasks)
    for base in ("llama-4x32", "bert-4x32"):
        own = [index for index, one in enumerate(tasks) if one.base == base]
        engine = StackedEpisodes(base, SCHEDULE, 4)
        expected = run_attempts(engine, [(tasks[index], Steered()) for index in own], 4)
        np.testing.assert_array_equal([losses[index] for index in own], expected)


def test_a_round_is_as_if_nothing_had_been_played(envs: ProxyVecEnv) -> None:
    """Played before it, and in the middle of it."""
    before = play_round(envs, 3)
    envs.reset()
    envs.play(SHIFT, rule_actions)
    assert_same(play_round(envs, 3), before)

    rewards = []
    for played in (False, True):
        envs.round = 3
        envs.reset()
        for decision in range(envs.decisions):
            if played:
                envs.play(SHIFT, rule_actions)
            rewards.append(envs.step(random_actions(envs, decision))[1])
    np.testing.assert_array_equal(rewards[: envs.decisions], rewards[envs.decisions :])
    assert rewards[-1].any()


def test_what_modules_are_worth_is_told_where_it_is_known(envs: ProxyVecEnv) -> None:
    tasks = [PLANTED[0], SHIFT[0]]
    noted: list[tuple[Arrays, Any]] = []
    envs.play(tasks, rule_actions, note=lambda arrays, worths: noted.append((arrays, worths)))
    assert len(noted) == 3
    engine = StackedEpisodes("llama-4x32", SCHEDULE, 1)
    engine.start({0: PLANTED[0]})
    expected = utilities(PLANTED[0], engine.problem(PLANTED[0]))[:, -1]
    for decision, (arrays, (known, unknown)) in enumerate(noted):
        np.testing.assert_array_equal(known, expected)
        assert unknown is None
        progress = arrays["run_features"][:, RUN_FEATURES.index("progress")]
        np.testing.assert_allclose(progress, SCHEDULE.steps(8)[decision] / 8)


# Processes ------------------------------------------------------------------------------------------------------------


def test_rounds_in_this_process_leave_it_alone() -> None:
    """Adapting a base draws numbers; whether it was adapted before must not matter."""
    adapted_base.cache_clear()
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    some = make()
    some.reset()
    some.step(random_actions(some, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2


def test_workers_beyond_the_stacks_are_not_started() -> None:
    assert config(workers=8, stacks=2).worker_count == 2
    assert config(workers=1, stacks=2).worker_count == 1


@pytest.mark.slow
def test_processes_decide_nothing_and_what_they_raise_arrives() -> None:
    options: Any = {"stacks": 2, "tasks_per_stack": 1}
    here, isolated = make(**options), make(**options, workers=2)
    try:
        assert_same(play_round(isolated, 0), play_round(here, 0))
        tasks = [*PLANTED, *SHIFT, task("shift", 9, "bert-4x32")]
        assert isolated.play(tasks, rule_actions) == here.play(tasks, rule_actions)

        poor = task("shift", budget=1e-9)
        for some in (here, isolated):
            with pytest.raises(BudgetError, match="fits no adapter at all"):
                some.play([*SHIFT[:1] * 4, poor], rule_actions)
        assert_same(play_round(isolated, 1), play_round(here, 1))

        isolated._processes[1].kill()
        with pytest.raises(WorkerError, match="worker process ended"):
            isolated.reset()
    finally:
        processes = list(isolated._processes)
        isolated.close()
        isolated.close()
    assert not any(process.is_alive() for process in processes)
