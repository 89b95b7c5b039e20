"""Rounds of fresh tasks as a VecEnv: its contract, its rewards, and that processes decide nothing."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
import torch
from numpy.typing import NDArray
from rankpilot.common.arrays import Arrays
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.policy import Decision, decision_from_scores
from rankpilot.decide.rules import MEAN_SIGNALS, signal_mean
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.bases import adapted_base
from rankpilot.env.proxy_finetune import utilities
from rankpilot.env.proxy_task import FRESH_SEEDS, ProxyTask, Reference
from rankpilot.env.stacked import StackedEpisodes
from rankpilot.env.vector import StackedConfig, StackedVectorEnv
from rankpilot.errors import BudgetError, ConfigError, WorkerError
from rankpilot.training import vec_env as rollout_env
from rankpilot.training.compare import run_attempts
from rankpilot.training.task_sampling import FreshTasks
from rankpilot.training.vec_env import ProxyVecEnv

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = DecisionSchedule(probe_steps=1, fractions=(0.0, 0.3, 0.6))
STEPS = 5
SIZES: Any = {"steps": STEPS, "batch_size": 4, "length": 16, "eval_rows": 8, "learning_rate": 4e-3}
REFERENCE = Reference(3.0, 2.2, 2.0)
MODULES = 28


def task(kind: Any = "planted", seed: int = 0, base: str = "llama-4x32", **options: Any) -> ProxyTask:
    return ProxyTask(kind, seed, base=base, **{**SIZES, "reference": REFERENCE, **options})


PLANTED, SHIFT = (task("planted", 1), task("planted", 2)), (task("shift", 3, budget=0.4), task("shift", 4))


def of_parameters(tasks: Sequence[ProxyTask]) -> tuple[ProxyTask, ...]:
    """The same tasks with budgets of parameters: nothing records steps to tell what ranks cost."""
    return tuple(replace(one, unit="parameters") for one in tasks)


def fresh(templates: Any = (PLANTED, SHIFT), count: int = 2, seed: int = 0) -> FreshTasks:
    return FreshTasks(templates, count, seed)


def make(
    templates: Any = (PLANTED, SHIFT), *, count: int = 2, stacks: int = 1, workers: int = 1, **options: Any
) -> ProxyVecEnv:
    settings: Any = {"episodes_per_task": 2, "actions": "scores", "against": "signal-mean", "max_modules": MODULES}
    stack = StackedConfig(2 * count, **{**settings, "schedule": SCHEDULE, **options})
    return ProxyVecEnv(fresh(templates, count), stack, stacks=stacks, workers=workers)


@pytest.fixture(scope="module")
def envs() -> Iterator[ProxyVecEnv]:
    made = make()
    yield made
    made.close()


def random_actions(envs: ProxyVecEnv, seed: int) -> NDArray[np.float32]:
    shape = (envs.num_envs, MODULES + 2)
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
            of_slot = {key: value[slot] for key, value in observations.items()}
            assert envs.observation_space.contains(of_slot)
        progress = observations["run_features"][:, RUN_FEATURES.index("progress")]
        np.testing.assert_allclose(progress, SCHEDULE.steps(STEPS)[decision] / STEPS)
        observations, rewards, ended, infos = envs.step(random_actions(envs, decision))
        assert (rewards.shape, rewards.dtype) == ((4,), np.float32)
        assert not any(info["TimeLimit.truncated"] for info in infos)
        if decision < 2:
            assert not ended.any() | rewards.any()
            assert envs.round == 5
            assert all("terminal_observation" not in info for info in infos)
    assert ended.all()
    assert rewards.all()
    assert envs.round == 6
    for slot, info in enumerate(infos):
        assert envs.observation_space.contains(info["terminal_observation"])
        assert np.count_nonzero(info["ranks"])
        assert not np.array_equal(
            info["terminal_observation"]["module_features"], observations["module_features"][slot]
        ), "the next round has begun"
    np.testing.assert_equal(observations["run_features"][:, RUN_FEATURES.index("progress")], 0)
    np.testing.assert_equal(envs.reset(), observations)


def test_the_rest_of_the_contract(envs: ProxyVecEnv) -> None:
    assert envs.get_attr("round", [0, 2]) == [envs.round] * 2
    assert envs.env_is_wrapped(object) == [False] * 4
    with pytest.raises(ConfigError, match="make a new ProxyVecEnv"):
        envs.set_attr("round", 3)
    with pytest.raises(AttributeError, match="'render'"):
        envs.env_method("render")
    envs.reset()
    for bad in (np.zeros((4, MODULES)), np.full((4, MODULES + 2), np.nan)):
        with pytest.raises(ConfigError, match="30 finite numbers"):
            envs.step(bad.astype(np.float32))


def test_tasks_of_several_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"same number of steps; got \[5, 6\]"):
        make(((task(), task(steps=STEPS + 1)),))


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_round_and_stack_alone() -> None:
    drawing = fresh(count=3, seed=7)
    assert drawing.draw(4, 1) == drawing.draw(4, 1) == fresh(count=3, seed=7).draw(4, 1)
    assert len({tuple(drawn) for drawn in (drawing.draw(4, 1), drawing.draw(5, 1), drawing.draw(4, 0))}) == 3
    assert fresh(count=3, seed=8).draw(4, 1) != drawing.draw(4, 1)


def test_drawn_tasks_are_templates_with_fresh_seeds() -> None:
    drawn = [one for round_ in range(20) for one in fresh(count=3).draw(round_, 0)]
    assert len({one.seed for one in drawn}) == len(drawn)
    assert all(one.seed >= FRESH_SEEDS for one in drawn)
    assert {replace(one, seed=0) for one in drawn} == {replace(one, seed=0) for one in (*PLANTED, *SHIFT)}
    assert all(one.reference == REFERENCE for one in drawn)


def test_suites_take_turns() -> None:
    drawing = fresh(count=3)
    for round_ in range(4):
        for stack in range(2):
            kinds = [one.kind for one in drawing.draw(round_, stack)]
            expected = ["planted", "shift", "planted", "shift"]
            assert kinds == expected[(round_ + stack) % 2 :][:3]


def test_kinds_of_budget_come_equally_often() -> None:
    odd = [replace(PLANTED[0], checkpointing=True), replace(PLANTED[0], priced_rows=32)]
    odd.append(replace(PLANTED[0], unit="parameters"))
    many = [replace(PLANTED[0], budget=0.5 + 0.01 * turn) for turn in range(30)]
    drawing = fresh(((*odd, *many),), 4)
    drawn = Counter(one.cost_kind for round_ in range(100) for one in drawing.draw(round_, 0))
    assert drawn.keys() == {"bytes", "checkpointed", "large batch", "parameters"}
    assert all(70 <= count <= 130 for count in drawn.values())


def test_a_stack_has_one_base() -> None:
    elsewhere = tuple(replace(one, base="bert-4x32") for one in PLANTED)
    drawing = fresh(((*PLANTED, *elsewhere), SHIFT), 3)
    drawn = [drawing.draw(round_, stack) for round_ in range(20) for stack in range(2)]
    assert all(len({one.base for one in tasks}) == 1 for tasks in drawn)
    assert {tasks[0].base for tasks in drawn} == {"llama-4x32", "bert-4x32"}
    for tasks in drawn:
        if tasks[0].base == "bert-4x32":
            assert {one.kind for one in tasks} == {"planted"}, "the other suite has no task there"


def test_stacks_lie_side_by_side_in_the_order_of_their_numbers() -> None:
    """Modules that exist tell the bases apart."""
    elsewhere = tuple(replace(one, base="bert-4x32") for one in PLANTED)
    drawing = make((of_parameters((*PLANTED, *elsewhere)),), stacks=3, count=1)
    counts = {base: len(adapted_base(base)[1]) for base in ("llama-4x32", "bert-4x32")}
    assert len(set(counts.values())) == 2
    seen_bases = set()
    for round_ in range(3):
        drawing.round = round_
        observations: Any = drawing.reset()
        bases = [drawing.fresh.draw(round_, stack)[0].base for stack in range(3)]
        expected = [counts[base] for base in bases for _ in range(2)]
        assert observations["mask"].sum(axis=1).tolist() == expected
        seen_bases |= set(bases)
    assert len(seen_bases) == 2


# Rewards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "fractions"), [("parameters", (0.0,)), ("bytes", (0.0, 0.3, 0.6))])
def test_whoever_acts_as_the_rule_gets_nothing(unit: Any, fractions: tuple[float, ...]) -> None:
    """The rule runs beside: the same losses, so what is left is the churn."""
    templates = tuple(tuple(replace(one, unit=unit) for one in suite) for suite in (PLANTED, SHIFT))
    envs = make(templates, schedule=replace(SCHEDULE, fractions=fractions))
    observations: Any = envs.reset()
    for _ in fractions:
        observations, rewards, _, infos = envs.step(rule_actions(observations))
    churn = [info["churn"] for info in infos]
    np.testing.assert_allclose(rewards + churn, 0, atol=1e-6)
    assert (max(churn) > 0) == (len(fractions) > 1)
    assert all(info["held_out_loss"] == info["other_loss"] for info in infos)


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
    tasks[1::2] = of_parameters(tasks[1::2])
    tasks = [*tasks[:3], hot, *tasks[3:], *(task("planted", seed) for seed in range(5))]
    told: list[tuple[int, int]] = []
    losses = envs.play(tasks, steered_actions, on_progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, len(tasks))
    assert told[-1] == (len(tasks), len(tasks))
    assert told == sorted(set(told))
    assert math.isnan(losses[3])
    assert len(set(losses)) == len(tasks)
    for base in ("llama-4x32", "bert-4x32"):
        indices = [index for index, one in enumerate(tasks) if one.base == base]
        engine = StackedEpisodes(base, SCHEDULE, 4)
        expected = run_attempts(engine, [(tasks[index], Steered()) for index in indices], 4)
        np.testing.assert_array_equal([losses[index] for index in indices], expected)


def test_a_round_is_as_if_nothing_had_been_played(envs: ProxyVecEnv) -> None:
    """Played before it, and in the middle of it."""
    before = play_round(envs, 3)
    envs.reset()
    envs.play(SHIFT, rule_actions)
    np.testing.assert_equal(play_round(envs, 3), before)

    envs.round = 3
    envs.reset()
    for decision, (_, expected, _, _) in enumerate(before[1:]):
        envs.play(SHIFT, rule_actions)
        rewards = envs.step(random_actions(envs, decision))[1]
        np.testing.assert_array_equal(rewards, expected)
    assert rewards.any()


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
        np.testing.assert_allclose(progress, SCHEDULE.steps(STEPS)[decision] / STEPS)


# Processes ------------------------------------------------------------------------------------------------------------


def test_rounds_in_this_process_leave_it_alone() -> None:
    """Adapting a base draws numbers; whether it was adapted before must not matter."""
    adapted_base.cache_clear()
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    envs = make()
    envs.reset()
    envs.step(random_actions(envs, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2


@pytest.mark.long
@pytest.mark.slow
def test_processes_decide_nothing_and_what_they_raise_arrives() -> None:
    """Nor does it matter when one of them dies, in the middle of a round or of whole tasks."""
    planted, shift = of_parameters(PLANTED), of_parameters(SHIFT)
    here, apart = (make((planted, shift), stacks=2, count=1, workers=workers) for workers in (1, 8))
    try:
        np.testing.assert_equal(play_round(apart, 0), play_round(here, 0))
        assert len(worker_processes(apart)) == 2, "more than there are stacks would be of no use"
        tasks = [*planted, *shift, task("shift", 9, "bert-4x32", unit="parameters")]
        assert apart.play(tasks, rule_actions) == here.play(tasks, rule_actions)

        poor = task("shift", budget=1e-9, unit="parameters")
        for envs in (here, apart):
            with pytest.raises(BudgetError, match="is too small for any adapter"):
                envs.play([*shift[:1] * 4, poor], rule_actions)
        np.testing.assert_equal(play_round(apart, 1), play_round(here, 1))

        expected = play_round(here, 2)
        apart.round = 2
        seen: list[Any] = [apart.reset()]
        for decision in range(apart.decisions):
            os.kill(worker_processes(apart)[decision % 2], signal.SIGKILL)
            seen.append(apart.step(random_actions(apart, decision)))
        np.testing.assert_equal(seen, expected)

        worths: list[Any] = []

        def kill_and_note(arrays: Arrays, worth: Any) -> None:
            worths.append(worth)
            os.kill(worker_processes(apart)[0], signal.SIGKILL)

        assert apart.play(tasks, rule_actions, note=kill_and_note) == here.play(tasks, rule_actions)
        assert len(worths) == 3 * 3, "three stacks, three decisions"
    finally:
        apart.close()
        apart.close()
    assert not any(apart.workers._processes)


def worker_processes(envs: ProxyVecEnv) -> list[int]:
    return [pid for process in envs.workers._processes for pid in process._processes]  # type: ignore[union-attr]


def test_a_round_at_which_workers_die_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_env, "EnvironmentStack", Deadly)
    envs = make(stacks=2, count=1, workers=2)
    envs.round = 7
    try:
        with pytest.raises(
            WorkerError, match=r"ended 3 times at the same work, .*: stack [01] of round 7 \(llama-4x32/"
        ):
            envs.reset()
    finally:
        envs.close()


class Deadly:
    """A stack that ends its process."""

    def __init__(self, config: StackedConfig) -> None:
        pass

    def begin(self, tasks: list[ProxyTask]) -> None:
        os._exit(1)


# The registered environment -------------------------------------------------------------------------------------------


def test_it_is_the_registered_environment_on_other_tasks(envs: ProxyVecEnv) -> None:
    """Same tasks, seeds and actions: the same observations and rewards, bit for bit."""
    vector = gym.make_vec(
        rankpilot.ENV_ID,
        num_envs=envs.num_envs,
        vectorization_mode="vector_entry_point",
        task=PLANTED[0],  # which comes after those that are given
        base="llama-4x32",
        episodes_per_task=2,
        actions="scores",
        against="signal-mean",
        schedule=SCHEDULE,
    )
    assert isinstance(vector, StackedVectorEnv)
    assert vector.single_observation_space == envs.observation_space
    assert vector.single_action_space == envs.action_space
    envs.round = 11
    tasks = envs.fresh.draw(11, 0)
    observations: Any = envs.reset()
    vector.begin({slot: tasks[slot // 2] for slot in range(4)})
    np.testing.assert_equal(vector.padded(), observations)
    for decision in range(envs.decisions):
        actions = random_actions(envs, decision)
        observations, rewards, ended, infos = envs.step(actions)
        same, same_rewards, terminated, _, gathered = vector.step(actions)
        assert terminated.tolist() == ended.tolist()
        np.testing.assert_array_equal(same_rewards.astype(np.float32), rewards)
        told = gathered["final_info"] if terminated.all() else gathered
        for slot, info in enumerate(infos):
            seen = {key: value[slot] for key, value in same.items()} if not ended.all() else gathered["final_obs"][slot]
            expected = {key: value[slot] for key, value in observations.items()}
            np.testing.assert_equal(seen, info.get("terminal_observation", expected))
            for key in ("task", "ranks", "churn", "held_out_loss", "other_loss"):
                assert told[key][slot] == info[key]
    assert rewards.any()
