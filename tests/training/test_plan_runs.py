"""Plan runs: runs that differ by their plans alone, files that a training resumes from, and dataset made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import RankNetwork
from rankpilot.agents.learned.policy import ALL_LINEAR, FIXED, FIXED_NAMES, LearnedPolicy
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES, module_feature
from rankpilot.agents.policy import decision_from_scores
from rankpilot.agents.rules import find_rule
from rankpilot.agents.settings import ONCE, DecisionSchedule, NetworkConfig
from rankpilot.common.workers import isolated
from rankpilot.cost.budget import reference_cost
from rankpilot.cost.cost import plan_cost
from rankpilot.env.bases import adapted_base
from rankpilot.env.proxy_finetune import ProxyFineTune
from rankpilot.env.proxy_task import ProxyTask, load_suite
from rankpilot.env.stacked import StackedEpisodes
from rankpilot.errors import RunFolderError
from rankpilot.plan.plan import project
from rankpilot.training import plan_runs as module
from rankpilot.training.config import TrainConfig
from rankpilot.training.plan_runs import (
    CHOICES,
    PLAN_CHOICES,
    REFERENCE,
    ROOM,
    RUNS,
    PlanRun,
    Stack,
    collect_plan_runs,
    plan_dataset,
    run_plans,
)
from rankpilot.training.task_sampling import fresh_tasks, plan_draws
from safetensors.numpy import load_file, save_file

from .made_up import plan_run as made_up

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.4))
MODULES = 28
PROGRESS = RUN_FEATURES.index("progress")


def task_in(unit: str, least_budget: float = 0.0) -> ProxyTask:
    """A training task, made small."""
    alike = [task for task in load_suite("planted", "train") if task.base == "llama-4x32" and task.unit == unit]
    chosen = next(task for task in alike if task.budget > least_budget and not task.checkpointing)
    return replace(chosen, steps=6, length=16, eval_rows=8, learning_rate=1e-3)


BYTES, PARAMETERS = task_in("bytes", 0.6), task_in("parameters")


def stack_of(*tasks: ProxyTask, number: int = 0, seed: int = 0) -> Stack:
    torch.manual_seed(0)
    actor = LearnedPolicy("actor", RankNetwork(NetworkConfig(width=8)).eval())
    return Stack(number, number, tasks, actor, SCHEDULE, seed, "cpu")


def run(stack: Stack) -> PlanRun:
    """As a worker does."""
    with isolated():
        return run_plans(stack)


def same(left: PlanRun, right: PlanRun) -> bool:
    arrays = [field.name for field in fields(PlanRun) if isinstance(getattr(left, field.name), np.ndarray)]
    return all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name in ("losses", "initial"))
        for name in arrays
    ) and (left.tasks, left.names) == (right.tasks, right.names)


@pytest.fixture(scope="module")
def made() -> Iterator[PlanRun]:
    """One stack of two tasks."""
    yield run(stack_of(BYTES, PARAMETERS))
    module._episodes.cache_clear()


# One stack ------------------------------------------------------------------------------------------------------------


def test_what_is_seen_and_decided_at_each_decision(made: PlanRun) -> None:
    runs = 2 * RUNS
    assert made.modules.shape == (2, runs, MODULES, len(MODULE_FEATURES))
    assert made.scores.shape == made.ranks.shape == (2, runs, MODULES)
    assert made.run.shape == (2, runs, len(RUN_FEATURES))
    assert made.losses.shape == made.initial.shape == made.gains.shape == (runs,)
    assert {part.dtype for part in (made.modules, made.scores, made.run)} == {np.dtype(np.float32)}
    assert made.ranks.dtype == np.int64
    np.testing.assert_allclose(made.run[:, :, PROGRESS], np.repeat([[0.0], [2 / 6]], runs, axis=1), atol=1e-6)
    np.testing.assert_allclose(made.scores.mean(axis=2), 0, atol=1e-6)
    assert made.scores.std(axis=2).min() > 0.01


def test_losses_are_those_of_whole_runs(made: PlanRun) -> None:
    assert np.isfinite(made.losses).all()
    assert (made.losses < made.initial).all(), "all have learned something"
    for part in (slice(0, RUNS), slice(RUNS, 2 * RUNS)):
        assert len(set(made.initial[part])) == 1, "one task, one start"
        assert len(set(made.losses[part])) > 5, "different plans"
    np.testing.assert_allclose(made.gains, -np.log(made.losses))


def test_runs_of_a_task_see_the_same_and_decide_differently_at_first(made: PlanRun) -> None:
    for part in (slice(0, RUNS), slice(RUNS, 2 * RUNS)):
        for seen in (made.modules, made.scores, made.run):
            assert (seen[0, part] == seen[0, part.start]).all()
    assert len(np.unique(made.ranks[0, :RUNS], axis=0)) > FIXED + 6
    assert len(np.unique(made.ranks[0, RUNS:], axis=0)) > FIXED + 4
    assert (made.modules[1, :RUNS] != made.modules[1, 0]).any(), "later they see what their plans led to"


def test_plans_cost_what_their_kind_may(made: PlanRun) -> None:
    targets = adapted_base(BYTES.base)[1]
    most = np.array([target.max_rank for target in targets])
    choices = np.array(PLAN_CHOICES)
    for task, part in ((BYTES, slice(0, RUNS)), (PARAMETERS, slice(RUNS, 2 * RUNS))):
        cost = ProxyFineTune(task).cost()
        limit = ProxyFineTune(task).limit.resolve(cost, most, torch.device("cpu")).value
        prices = np.array([plan_cost(cost, ranks) for ranks in made.ranks[0, part]])
        within = prices[np.isin(choices, [*FIXED_NAMES, "drawn"])]
        assert within.max() <= limit
        assert within.min() > 0.8 * limit, "and it is spent"
        assert prices[choices == "drawn for less"].max() < limit
        plain = reference_cost(cost, most)
        assert prices[choices == ALL_LINEAR] == [plain]
        assert limit < plain, "it costs more than the task allows"
        assert prices.max() <= ROOM * plain
        assert len(np.unique(prices)) > RUNS / 2, "plans of many costs"
    assert (made.ranks <= most).all()
    assert made.ranks.min() >= 0


def test_the_first_run_of_a_task_has_plain_lora_to_the_end(made: PlanRun) -> None:
    plain = np.minimum(8, [target.max_rank for target in adapted_base(BYTES.base)[1]])
    for start in (0, RUNS):
        np.testing.assert_array_equal(made.ranks[0, start + REFERENCE], plain)


def test_kinds_of_modules_are_among_the_plans(made: PlanRun) -> None:
    """In a layer of this base the last three modules are the MLP."""
    wide = np.arange(MODULES) % 7 >= 4
    for kind, adapted in (("narrow", ~wide), ("wide", wide)):
        for start in (0, RUNS):
            ranks = made.ranks[0, start + PLAN_CHOICES.index(kind)]
            np.testing.assert_array_equal(ranks > 0, adapted)
            assert len(set(ranks[adapted])) == 1


def test_the_first_runs_follow_the_rules_and_the_actor(made: PlanRun) -> None:
    with isolated():
        episodes = StackedEpisodes(BYTES.base, SCHEDULE, 2)
        episodes.start_all([BYTES, PARAMETERS])
    observations = [episode.observation for episode in episodes.under_way.values()]
    actor = stack_of().actor
    for observation, start in zip(observations, (0, RUNS), strict=True):
        np.testing.assert_allclose(made.modules[0, start], observation.modules, atol=1e-5)
        for number, policy in enumerate([find_rule("top-down"), find_rule("signal-mean"), None, actor]):
            costs = module_feature(observation, "rank_cost")
            decision = policy.decide(observation) if policy else decision_from_scores(observation, costs)
            expected = project(observation.problem, decision.ranks, decision.scores).ranks
            np.testing.assert_array_equal(made.ranks[0, start + 2 + number], expected)


def test_stacks_share_the_fixed_plans_and_draw_others() -> None:
    here, there = (run(stack_of(BYTES, number=number)) for number in range(2))
    same_plans = FIXED + 1
    np.testing.assert_array_equal(here.ranks[0, :same_plans], there.ranks[0, :same_plans])
    np.testing.assert_array_equal(here.modules[0], there.modules[0])
    assert (here.ranks[0, same_plans:] != there.ranks[0, same_plans:]).any(axis=1).sum() > 5


def test_a_stack_gives_the_same_again(made: PlanRun) -> None:
    """Whatever this process flew before, and in a new one too."""
    run(stack_of(PARAMETERS, replace(BYTES, seed=5), number=3))
    again = run(stack_of(BYTES, PARAMETERS))
    assert same(again, made)
    module._episodes.cache_clear()
    assert same(run(stack_of(BYTES, PARAMETERS)), made)
    assert not same(run(stack_of(BYTES, PARAMETERS, seed=1)), made)


def test_which_task_was_run_and_what_was_chosen(made: PlanRun) -> None:
    assert made.tasks == (BYTES, PARAMETERS)
    assert made.names == tuple(target.name for target in adapted_base(BYTES.base)[1])
    assert made.choices is not None
    first, later = (np.array(CHOICES)[row] for row in made.choices)
    assert first.tolist() == [*PLAN_CHOICES] * 2
    assert set(later) == {"drawn", "keep"}
    kept = later == "keep"
    np.testing.assert_array_equal(made.ranks[1, kept], made.ranks[0, kept])
    assert kept.sum() > RUNS, "most keep"


def test_what_a_run_was_comes_back_from_its_file(
    made: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "run_plans", lambda stack: made)
    (read,) = collect_plan_runs([stack_of(BYTES, PARAMETERS)], tmp_path, workers=1)
    assert same(read, made)
    assert read.choices is not None


def test_runs_that_fail_have_gained_nothing() -> None:
    each = run(stack_of(replace(BYTES, learning_rate=1e30), BYTES))
    failed = np.isnan(each.losses)
    assert failed[:RUNS].any(), "some are not finite, and others are worse than at the start"
    assert not failed[RUNS:].any()
    np.testing.assert_allclose(each.gains[:RUNS], -np.log(each.initial[:RUNS]))
    np.testing.assert_allclose(each.gains[RUNS:], -np.log(each.losses[RUNS:]))
    gone = each.ranks.min(axis=2) < 0
    assert not gone[0].any()
    assert gone[1].any(), "some fail before the second decision"
    assert not gone[1, ~failed].any()
    dataset = plan_dataset([each])
    assert len(dataset.gains) == len(dataset.plans.ranks) == np.count_nonzero(~gone), "they decide no more"
    assert torch.isfinite(dataset.gains).all()
    assert all(bool(torch.isfinite(part).all()) for part in vars(dataset.plans).values())


def test_a_stack_of_which_nothing_is_left_has_one_decision() -> None:
    each = run(stack_of(replace(BYTES, learning_rate=1e38)))
    assert np.isnan(each.losses).all()
    assert each.ranks.shape == (1, RUNS, MODULES)
    assert np.ptp(each.gains) == 0


# Many stacks ----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stacks whose number is 90 or more fail; the rest are made up. Returns the numbers of those that were made."""
    seen: list[int] = []

    def fake(stack: Stack) -> PlanRun:
        if stack.number >= 90:
            raise Killed
        seen.append(stack.number)
        return made_up(stack.number)

    monkeypatch.setattr(module, "run_plans", fake)
    return seen


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def numbered(*numbers: int) -> list[Stack]:
    return [stack_of(BYTES, number=number) for number in numbers]


def test_plan_runs_come_in_order_and_stay_in_files(fake_runs: list[int], tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    folder = tmp_path / "new" / "plan_runs"
    given = numbered(2, 0, 1)
    runs = list(collect_plan_runs(given, folder, workers=1, on_progress=lambda *done: progress.append(done)))
    assert fake_runs == [2, 0, 1]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(same(each, made_up(stack.number)) for each, stack in zip(runs, given, strict=True))
    assert names(folder) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    for number in range(3):
        arrays = load_file(folder / f"0000{number}.safetensors")
        assert same(PlanRun(**arrays), made_up(number))


def test_an_interrupted_training_goes_on_where_it_was(fake_runs: list[int], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        list(collect_plan_runs(numbered(0, 2, 90, 3), tmp_path, workers=1))
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(contents) == ["00000.safetensors", "00002.safetensors"], "whole files, and no temporary ones"
    progress: list[tuple[int, int]] = []
    for _ in range(2):
        given = numbered(0, 1, 2, 3)
        runs = list(collect_plan_runs(given, tmp_path, workers=1, on_progress=lambda *done: progress.append(done)))
        assert all(same(each, made_up(number)) for number, each in enumerate(runs))
        assert fake_runs == [0, 2, 1, 3], "nothing is run again"
    assert progress[:3] == [(2, 4), (3, 4), (4, 4)]
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents


def test_a_file_is_whole_or_absent(fake_runs: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def torn(arrays: Any, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", torn)
        with pytest.raises(Killed):
            list(collect_plan_runs(numbered(0), tmp_path, workers=1))
    assert names(tmp_path) == []
    assert same(next(collect_plan_runs(numbered(0), tmp_path, workers=1)), made_up(0))
    assert fake_runs == [0, 0]


@pytest.mark.parametrize("damage", ["cut", "other version", "no version"])
def test_a_trial_that_is_damaged_or_of_another_version_is_refused(
    fake_runs: list[int], tmp_path: Path, damage: str
) -> None:
    list(collect_plan_runs(numbered(0), tmp_path, workers=1))
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        save_file(load_file(path), path, metadata={"schema": "1"} if damage == "other version" else None)
    with pytest.raises(RunFolderError, match="cannot be read" if damage == "cut" else "another version"):
        list(collect_plan_runs(numbered(0), tmp_path, workers=1))


# The data set ---------------------------------------------------------------------------------------------------------


def test_a_run_that_failed_or_got_worse_has_gained_nothing() -> None:
    each = replace(
        made_up(), losses=np.array([0.5, math.nan, 2.0, math.inf, 0.0]), initial=np.array([1.0, 0.8, 0.8, 0.8, 1.0])
    )
    np.testing.assert_allclose(each.gains, -np.log([0.5, 0.8, 0.8, 0.8, 1e-6]))


PLAN_RUNS = (made_up(0, decisions=2, tasks=2, modules=3), made_up(1, decisions=1, tasks=1, modules=5))
PLACES = [
    (each, decision, run)
    for each in PLAN_RUNS
    for decision in range(each.ranks.shape[0])
    for run in range(each.ranks.shape[1])
]


def test_rows_are_all_decisions_of_all_runs() -> None:
    dataset = plan_dataset(PLAN_RUNS)
    plans = dataset.plans
    rows = len(PLACES)
    assert rows == 2 * 2 * RUNS + RUNS
    assert plans.modules.shape == (rows, 5, len(MODULE_FEATURES))
    assert plans.scores.shape == plans.mask.shape == (rows, 5)
    assert plans.run.shape == (rows, len(RUN_FEATURES))
    assert plans.ranks.shape == (rows, 1, 5)
    assert {plans.modules.dtype, plans.scores.dtype, plans.run.dtype, dataset.gains.dtype} == {torch.float32}
    assert plans.ranks.dtype == dataset.groups.dtype == dataset.tasks.dtype == torch.int64
    for row, (each, decision, run) in enumerate(PLACES):
        count = each.ranks.shape[2]
        assert plans.mask[row].tolist() == [1.0] * count + [0.0] * (5 - count), "other modules are padding"
        assert not any(part[row, ..., count:].any() for part in (plans.scores, plans.ranks))
        assert not plans.modules[row, count:].any()
        np.testing.assert_array_equal(plans.modules[row, :count], each.modules[decision, run])
        np.testing.assert_array_equal(plans.scores[row, :count], each.scores[decision, run])
        np.testing.assert_array_equal(plans.run[row], each.run[decision, run])
        np.testing.assert_array_equal(plans.ranks[row, 0, :count], each.ranks[decision, run])
        assert float(dataset.gains[row]) == pytest.approx(each.gains[run])
        reference = each.gains[run // RUNS * RUNS + REFERENCE]
        assert float(dataset.reference_gains[row]) == pytest.approx(reference)


def test_a_group_is_one_decision_of_one_task() -> None:
    dataset = plan_dataset(PLAN_RUNS)
    groups: dict[Any, set[int]] = {}
    tasks: dict[Any, set[int]] = {}
    for row, (each, decision, run) in enumerate(PLACES):
        task = (PLAN_RUNS.index(each), run // RUNS)
        groups.setdefault((task, decision), set()).add(int(dataset.groups[row]))
        tasks.setdefault(task, set()).add(int(dataset.tasks[row]))
    for numbering, count in ((groups, 2 * 2 + 1), (tasks, 3)):
        assert len(numbering) == count
        assert all(len(numbers) == 1 for numbers in numbering.values()), "one number for each"
        assert len(set.union(*numbering.values())) == count, "and each has its own"


# By default -----------------------------------------------------------------------------------------------------------


def test_policies_are_trained_to_decide_once() -> None:
    """And their plan runs have one decision, after which no signal is read any more."""
    assert TrainConfig().schedule.steps(100) == (0,)
    each = run(replace(stack_of(PARAMETERS), schedule=ONCE))
    assert each.ranks.shape == (1, RUNS, MODULES)
    assert np.isfinite(each.losses).all()
    assert plan_dataset([each]).groups.unique().tolist() == [0]


def test_half_of_the_tasks_have_other_numbers_of_steps_and_rows() -> None:
    """Those of one stack the same ones; a step that is priced at more rows than it has stays so."""
    config = TrainConfig(bases=("llama-4x32",), tasks_per_stack=4)
    draws = plan_draws(fresh_tasks(config), 64)
    plain, varied = draws[: len(draws) // 2], draws[len(draws) // 2 :]
    assert {(task.steps, task.batch_size) for stack in plain for task in stack} == {(100, 4)}
    for stack in varied:
        assert len({(task.steps, task.batch_size, task.length) for task in stack}) == 1
    tasks = [task for stack in varied for task in stack]
    assert {task.steps for task in tasks} == {50, 100, 200}
    assert {task.batch_size for task in tasks} == {2, 4, 8}
    assert {task.priced_rows for task in tasks} > {None}
    assert draws == plan_draws(fresh_tasks(config), 64)
