"""The suites: what they are made of, and the cards that ship with the package."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
import torch
from rankpilot.common.files import append_json_line
from rankpilot.cost.cost import plan_cost
from rankpilot.data.corpora import CORPORA
from rankpilot.data.task import SPLITS, SUITES
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env import bases
from rankpilot.env import proxy_task as suites
from rankpilot.env.bases import BASES_FOLDER, adapted_base
from rankpilot.env.episode import Episode, reference_of
from rankpilot.env.proxy_finetune import ProxyFineTune, check_texts, oracle_plan
from rankpilot.env.proxy_task import (
    FOLDER,
    PLACEMENTS,
    PROXY_BASES,
    VERSION,
    ProxyTask,
    Reference,
    evenly,
    find_tasks,
    load_suite,
)
from rankpilot.env.rank_allocation import RankAllocationEnv
from rankpilot.errors import ConfigError, UnknownNameError
from rankpilot.plan.plan import check_budget, uniform_ranks
from rankpilot.plan.problem import AllocationProblem
from rankpilot.training.results import mean_and_interval

from tools import make_suites
from tools.make_suites import LARGE_BATCH, RATES, MakeConfig, budget_range, definitions

MakeTask = Callable[..., ProxyTask]
PARTS = [(suite, split) for suite in SUITES for split in SPLITS]
MEASURED = ("learning_rate", "reference")

needs_cards = pytest.mark.skipif(
    not all((FOLDER / f"{suite}-{split}.json").is_file() for suite, split in PARTS), reason="cards are not measured yet"
)


@pytest.fixture(scope="module")
def all_bases() -> Iterator[None]:
    """Bases whose weights are not here are untrained ones: what plans cost on them is the same."""
    known = bases._weights
    here = {path.parent.name for path in BASES_FOLDER.glob("*/model.safetensors")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bases, "_weights", lambda name: known(name) if name in here else {})
        yield


@pytest.fixture(scope="module")
def defined(all_bases: None) -> dict[tuple[str, str], list[ProxyTask]]:
    return {part: definitions(*part) for part in PARTS}


@pytest.fixture(scope="module")
def shipped() -> dict[tuple[str, str], tuple[ProxyTask, ...]]:
    return {part: load_suite(*part) for part in PARTS}


def check_separate(parts: dict[tuple[str, str], Any]) -> None:
    """Ids and seeds are unique, and no source but the planted teachers' is in two splits."""
    everything = [task for tasks in parts.values() for task in tasks]
    assert len({task.id for task in everything}) == len({task.seed for task in everything}) == len(everything)
    assert {task.corpus for task in everything if task.kind == "planted"} == {"documentation"}
    # Labelled posts and the same posts as text are one source, so kinds do not count.
    sources = [{task.corpus for suite in SUITES for task in parts[suite, split]} for split in SPLITS]
    assert all(one & other == {"documentation"} for one, other in itertools.combinations(sources, 2))


# What is defined ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_bases")
def test_bytes_of_large_batches_make_ranks_cheap(defined: dict[tuple[str, str], list[ProxyTask]]) -> None:
    for (suite, split), every in defined.items():
        large = [task for task in every if task.priced_rows]
        assert large == every[-LARGE_BATCH[split] :]
        assert {task.priced_rows for task in large} <= set(make_suites.MANY_ROWS)
        assert {task.placement for task in large} == (set(PLACEMENTS) if suite == "planted" else {"spread"})
        for task in large:
            assert (task.unit, task.checkpointing) == ("bytes", False)
            assert 1.02 * budget_range(task)[0] * 0.99 <= task.budget <= 1.0
            assert _rank_over_layer(task) < 0.6 * _rank_over_layer(replace(task, priced_rows=None))


def _rank_over_layer(task: ProxyTask) -> float:
    """What one more rank on all modules costs beside what one more layer at rank 1 costs."""
    cost, (_, targets) = ProxyFineTune(task).cost(), adapted_base(task.base)
    blocks = np.array([target.block for target in targets])
    top, two = (blocks >= blocks.max()).astype(np.int64), (blocks >= blocks.max() - 1).astype(np.int64)
    return (plan_cost(cost, 2 * top) - plan_cost(cost, top)) / (plan_cost(cost, two) - plan_cost(cost, top))


def _problem(task: ProxyTask) -> Any:
    targets, cost = adapted_base(task.base)[1], ProxyFineTune(task).cost()
    most = np.array([target.max_rank for target in targets], dtype=np.int64)
    limit = ProxyFineTune(task).limit.resolve(cost, most, torch.device("cpu"))
    return AllocationProblem.of(targets, cost, limit.value, ranks=np.ones(len(most), dtype=np.int64))


# How they are measured ------------------------------------------------------------------------------------------------


def test_measuring_tunes_the_rate_and_keeps_what_was_reached(
    make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (1e-3, 2e-2)
    monkeypatch.setattr(make_suites, "DecisionSchedule", lambda: DecisionSchedule(probe_steps=3))
    monkeypatch.setattr(make_suites, "RATES", rates)
    tasks = [
        make_task("planted", 90, steps=8, budget=0.25, unit="parameters"),
        make_task("shift", 91, steps=8),
        make_task("shift", 92, steps=8),
    ]
    batches = list(make_suites.measure(tasks, 4))
    assert [len(batch) for batch in batches] == [2, 1]
    for before, after in zip(tasks, itertools.chain(*batches), strict=True):
        known, model, problem = after.reference, adapted_base(after.base)[0], _problem(after)
        assert replace(after, learning_rate=before.learning_rate, reference=None) == before
        assert known is not None
        with model.disable_adapter():
            assert known.initial == pytest.approx(ProxyFineTune(after).held_out_loss(model), abs=1e-4)
        assert known.initial > known.uniform == round(known.uniform, 5)
        uniform, losses = uniform_ranks(problem), {}
        for rate in rates:
            task = replace(after, learning_rate=rate)
            losses[rate] = Episode(ProxyFineTune(task), schedule).run_fixed(uniform)
        assert losses[after.learning_rate] == pytest.approx(known.uniform, abs=1e-4)
        assert min(losses.values()) == pytest.approx(known.uniform, abs=1e-4)
        best = oracle_plan(after, problem) if after.kind == "planted" else np.minimum(32, problem.max_ranks)
        assert Episode(ProxyFineTune(after), schedule).run_fixed(best) == pytest.approx(known.best, abs=1e-4)


def test_an_interrupted_measurement_goes_on(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {part: [make_task("shift", 10 * index + turn) for turn in range(2)] for index, part in enumerate(PARTS)}
    asked: list[int] = []

    def measure(missing: list[ProxyTask], runs: int) -> Iterator[list[ProxyTask]]:
        for task in missing:
            asked.append(task.seed)
            if len(asked) == 5:
                raise KeyboardInterrupt
            yield [replace(task, learning_rate=1e-3, reference=Reference(3.0, 2.0, 1.5))]

    monkeypatch.setattr(make_suites, "definitions", lambda suite, split: tasks[suite, split])
    monkeypatch.setattr(make_suites, "measure", measure)
    monkeypatch.setattr(make_suites, "FOLDER", tmp_path / "cards")
    monkeypatch.setattr(suites, "FOLDER", tmp_path / "cards")
    config = MakeConfig(ledger=tmp_path / "ledger")
    with pytest.raises(KeyboardInterrupt):
        make_suites.main(config)
    assert not (tmp_path / "cards").exists()
    make_suites.main(config)
    assert sorted(asked) == sorted([*range(0, 60, 10), *range(1, 60, 10), asked[4]]), "nothing twice but what failed"
    load_suite.cache_clear()
    try:
        for part in PARTS:
            assert [task.seed for task in load_suite(*part)] == [task.seed for task in tasks[part]]
            assert {task.reference for task in load_suite(*part)} == {Reference(3.0, 2.0, 1.5)}
            card = json.loads((tmp_path / "cards" / f"{part[0]}-{part[1]}.json").read_text())
            assert (card["suite"], card["version"]) == (part[0], VERSION)
    finally:
        load_suite.cache_clear()
    with pytest.raises(UnknownNameError, match="proxy base 'lama'"):
        make_suites.main(replace(config, bases=("lama",)))
    append_json_line(tmp_path / "ledger" / "other.jsonl", {"seed": 999_999})
    make_suites.main(config)  # what no suite asks for is left alone


# What ships -----------------------------------------------------------------------------------------------------------


@needs_cards
def test_cards_are_separate_and_known(shipped: dict[tuple[str, str], tuple[ProxyTask, ...]]) -> None:
    check_separate(shipped)
    everything = [task for tasks in shipped.values() for task in tasks]
    check_texts(everything)
    for task in everything:
        known = task.reference
        assert known is not None
        assert known.best is not None
        assert all(np.isfinite(value) and value > 0 for value in (known.initial, known.uniform, known.best))
        assert known.headroom > 0
        assert task.learning_rate in RATES
        assert task.base in PROXY_BASES
    idle = [task.id for task in everything if task.reference and task.reference.uniform >= task.reference.initial]
    assert len(idle) <= 1, "the uniform run learns"


@needs_cards
def test_the_oracle_leaves_uniform_behind_where_there_are_few_parameters(
    shipped: dict[tuple[str, str], tuple[ProxyTask, ...]],
) -> None:
    """Mean rank 1 and 2, test split: a planted suite has to have something to win."""
    tasks = [task for task in shipped["planted", "test"] if task.unit == "parameters"]
    assert len(tasks) >= 20
    assert {task.budget for task in tasks} == {1 / 8, 2 / 8}
    gains = [np.log(task.reference.uniform / (task.reference.best or 1)) for task in tasks if task.reference]
    mean, low, _ = mean_and_interval(gains)
    assert mean >= 0.15
    assert low > 0


@needs_cards
@pytest.mark.usefixtures("all_bases")
def test_cards_are_the_definitions(
    shipped: dict[tuple[str, str], tuple[ProxyTask, ...]], defined: dict[tuple[str, str], list[ProxyTask]]
) -> None:
    for part in PARTS:
        for card, task in zip(shipped[part], defined[part], strict=True):
            assert card.budget == pytest.approx(task.budget, rel=0.01)
            changed = {name: getattr(card, name) for name in (*MEASURED, "budget")}
            assert replace(task, **changed) == card
        written = json.loads((FOLDER / f"{part[0]}-{part[1]}.json").read_text())
        assert (written["suite"], written["version"]) == (part[0], VERSION)


@needs_cards
@pytest.mark.usefixtures("all_bases")
def test_every_card_fits_an_adapter(shipped: dict[tuple[str, str], tuple[ProxyTask, ...]]) -> None:
    for tasks in shipped.values():
        for task in tasks:
            problem = _problem(task)
            check_budget(problem, [target.name for target in adapted_base(task.base)[1]])
            assert uniform_ranks(problem).any()


@needs_cards
def test_the_registered_environment_draws_from_the_suites(
    shipped: dict[tuple[str, str], tuple[ProxyTask, ...]], schedule: DecisionSchedule
) -> None:
    env = gym.make(rankpilot.ENV_ID, schedule=schedule, task_overrides={"steps": 6, "eval_rows": 16})
    ids = {replace(task, steps=6).id for suite in SUITES for task in shipped[suite, "train"]}
    drawn = {env.reset(seed=seed)[1]["task"] for seed in range(3)}
    assert drawn <= ids
    base = RankAllocationEnv(bases=("llama-4x32",), split="test", suites=("shift",), schedule=schedule)
    assert {task.base for task in base.tasks} == {"llama-4x32"}
    assert set(base.tasks) <= set(shipped["shift", "test"])
    assert base.max_modules == 28
    assert base.reset(seed=0)[1]["uniform_loss"] in {task.reference.uniform for task in base.tasks if task.reference}


PYTHONS_OWN = ("documentation", "code")
"""Texts that come from the running Python; the cards were measured on those of 3.11."""


@needs_cards
@pytest.mark.assets
@pytest.mark.parametrize(
    ("suite", "texts"),
    [
        pytest.param(
            "planted", PYTHONS_OWN, marks=pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="texts of 3.11")
        ),
        ("shift", set(CORPORA) - set(PYTHONS_OWN)),
    ],
)
def test_a_known_reference_is_what_a_new_run_measures(
    shipped: dict[tuple[str, str], tuple[ProxyTask, ...]],
    schedule: DecisionSchedule,
    suite: str,
    texts: Collection[str],
) -> None:
    task = next(task for task in shipped[suite, "train"] if task.base == "llama-4x32" and task.corpus in texts)
    assert task.reference is not None
    again = reference_of(ProxyFineTune(replace(task, reference=None)), schedule)
    assert again.initial == pytest.approx(task.reference.initial, abs=1e-3)
    assert again.uniform == pytest.approx(task.reference.uniform, rel=0.02)


# Finding and drawing --------------------------------------------------------------------------------------------------


def test_finding(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(3.0, 2.0, 1.0)
    made = {
        "shift": (make_task(seed=1, reference=reference), make_task(seed=2, base="bert-4x64", reference=reference)),
        "planted": (make_task("planted", 3, reference=reference),),
    }
    monkeypatch.setattr(suites, "load_suite", lambda name, split: made[name])
    assert [task.seed for task in find_tasks(("shift", "planted"), "train")] == [1, 2, 3]
    assert [task.seed for task in find_tasks(("shift", "planted", "shift"), "train")] == [1, 2, 3]
    assert [task.seed for task in find_tasks(("shift", "planted"), "train", ("llama-4x32",))] == [1, 3]
    assert [task.reference for task in find_tasks(("shift",), "train")] == [reference] * 2
    changed = find_tasks(("shift",), "train", None, {"steps": 5})
    assert [(task.steps, task.reference) for task in changed] == [(5, None)] * 2, "a reference is of its own task"
    kept = find_tasks(("shift",), "train", None, {"steps": 5, "reference": reference})
    assert [task.reference for task in kept] == [reference] * 2
    with pytest.raises(ConfigError, match=r"No task of the train split of \('planted',\) is on \('bert-4x64',\)"):
        find_tasks(("planted",), "train", ("bert-4x64",))


def test_some_of_them_evenly(make_task: MakeTask) -> None:
    tasks = [make_task(seed=seed) for seed in range(10)]
    assert [task.seed for task in evenly(tasks, 5)] == [0, 2, 4, 6, 8]
    assert [task.seed for task in evenly(tasks, 3)] == [0, 3, 6]
    assert evenly(tasks, 99) == tuple(tasks)
