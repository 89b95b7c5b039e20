"""From rows to outcomes: what is missing, tuning, shared rows, budgets; which methods there are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rankpilot.errors import ConfigError, UnknownNameError

from benchmarks.methods import run
from benchmarks.methods.plans import deepest, window
from benchmarks.methods.registry import METHODS, find_method
from benchmarks.methods.rows import RowStore, Work, plan_ranks, plan_text
from benchmarks.methods.study import DoesNotFitError, MissingRowsError, Study
from benchmarks.methods.tasks import SUITES, Cell, MethodTask, Suite, find_suite

from .made_up import MODULES, SUITE, TASK, costs, new_study, row_of


def fill(study: Study, name: str, cell: Cell, gains: dict[str, float]) -> list[Work]:
    """Run a method on rows that are made up, until nothing is missing; returns all work."""
    works: list[Work] = []
    while missing := run.missing_work(study, cell, [METHODS[name]]):
        works += missing
        for work in missing:
            study.rows.add(work, row_of(work, gains))
    return works


@pytest.mark.parametrize("ranks", [[8], [0, 0, 16], [1, 2, 2, 1]])
def test_a_plan_is_the_same_after_its_text(ranks: list[int]) -> None:
    assert plan_ranks(plan_text(ranks)).tolist() == ranks


def test_the_text_of_a_plan() -> None:
    assert plan_text([0, 0, 16, 16, 8]) == "0x2 16x2 8x1"


@pytest.mark.parametrize("name", METHODS)
def test_each_method_comes_to_an_end_in_each_cell(name: str) -> None:
    """The test matrix: a row for each method."""
    study = new_study()
    for cell in SUITE.cells:
        works = fill(study, name, cell, {})
        assert len(works) == len(set(works)), "no work is asked for twice"
        trained = [work for work in works if work.kind == "train"]
        for work in trained:
            assert work.get("tuning") == (True if work.get("seed") in SUITE.tuning_seeds else None)
        try:
            outcome = METHODS[name].outcome(study, cell)
        except DoesNotFitError:
            continue
        assert [work.get("seed") for work in outcome.works] == list(SUITE.seeds)
        assert {work.get("rate") for work in outcome.works} == {outcome.rate}
        assert not set(outcome.works) & outcome.tuning, "results use no tuning run"
        limit = study.modules(cell.task).problem(cell.budget).limit
        assert all(value is None or value <= limit for value in outcome.bytes)


def test_the_rate_is_extended_while_the_best_is_at_an_edge() -> None:
    study = new_study()
    best = TASK.rate * 8

    def loss(work: Work) -> float:
        return abs(math.log2(work.get("rate") / best)) + 1

    def make(rate: float, seed: int) -> Work:
        return study.plan_run(TASK, np.full(8, 8), rate, seed)

    tried = set()
    while True:
        try:
            rate, found, works = study.tuned(TASK, make)
            break
        except MissingRowsError as error:
            for work in error.works:
                tried.add(work.get("rate") / TASK.rate)
                study.rows.add(work, {"loss": loss(work), "cpu_s": 1.0})
    assert (rate, found, len(works)) == (best, 1.0, 6)
    assert tried == {0.5, 1, 2, 4, 8, 16}


def test_a_rate_at_which_runs_diverge_is_never_taken() -> None:
    study = new_study()

    def make(rate: float, seed: int) -> Work:
        return study.plan_run(TASK, np.full(8, 8), rate, seed)

    for factor in (-1, 0, 1):
        loss = None if factor else 2.0
        study.rows.add(make(TASK.rate * 2.0**factor, 101), {"loss": loss, "cpu_s": 1.0})
    assert study.tuned(TASK, make)[:2] == (TASK.rate, 2.0)


def test_methods_with_one_plan_share_rows() -> None:
    study = new_study()
    fill(study, "all-linear-8", SUITE.cells[1], {})
    again = fill(study, "all-linear-8-ckpt", SUITE.cells[1], {})
    assert {work.kind for work in again} == {"recompute"}


def test_what_does_not_fit_is_not_run() -> None:
    study = new_study()
    assert [work.kind for work in fill(study, "all-linear-8", SUITE.cells[0], {})] == ["costs"]
    with pytest.raises(DoesNotFitError):
        METHODS["all-linear-8"].outcome(study, SUITE.cells[0])


def test_eva_does_not_fit_where_the_pooler_alone_does() -> None:
    cell, layers = SUITE.cells[0], costs()["modules"]
    for top in ("h.3.mlp.c_fc", "pooler.dense"):
        study, named = new_study(), [*layers[:-2], ["pooler.dense", *layers[-2][1:]], [top, *layers[-1][1:]]]
        study.rows.add(Work.of("costs", cell.task), {**costs(), "modules": named})
        if top == "pooler.dense":
            with pytest.raises(DoesNotFitError):
                METHODS["eva"].outcome(study, cell)
        else:
            fill(study, "eva", cell, {})
            assert {work.get("plan") for work in METHODS["eva"].outcome(study, cell).works} == {"0x7 8x1"}


def test_simple_takes_the_best_window_and_counts_what_it_tried() -> None:
    study = new_study()
    fill(study, "simple", SUITE.cells[1], {"0x4 16x4": 0.5})
    outcome = METHODS["simple"].outcome(study, SUITE.cells[1])
    assert {work.get("plan") for work in outcome.works} == {"0x4 16x4"}
    assert len({work.get("plan") for work in outcome.tuning}) > 3


def test_rows_are_kept_and_packed(tmp_path: Path) -> None:
    works = [Work.of("train", TASK, trainer="lora", plan="8x8", rate=0.1, seed=seed) for seed in (1, 2)]
    store = RowStore(tmp_path, None)
    for work in works:
        store.add(work, {"loss": work.get("seed") / 3, "cpu_s": 1.0})
    again = RowStore(tmp_path, None)
    assert [again.get(work) for work in works] == [store.get(work) for work in works]
    packed = tmp_path / "packed.parquet"
    assert store.pack(packed, {works[0]}) == packed.stat().st_size
    small = RowStore(None, packed)
    assert (len(small), small.get(works[0]), small.get(works[1])) == (1, store.get(works[0]), None)


def test_another_task_has_other_rows() -> None:
    other = MethodTask(**{**vars(TASK), "steps": 9})
    assert Work.of("costs", TASK).key != Work.of("costs", other).key


def test_test_cells_and_validation_cells_share_no_data() -> None:
    own = {cell.task.data for cell in SUITES["validation"].cells}
    for name in ("quick", "standard", "full"):
        assert not own & {cell.task.data for cell in SUITES[name].cells}
    assert len(SUITES["standard"].cells) >= 12
    assert len(SUITES["standard"].seeds) >= 5
    assert {cell.name for cell in SUITES["standard"].cells} <= {cell.name for cell in SUITES["full"].cells}


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="none in common"):
        Suite(SUITE.cells, (1,), (1,), 2)
    with pytest.raises(ConfigError, match="is a share"):
        Cell(TASK, "6GiB")
    with pytest.raises(ConfigError, match="at least 1"):
        MethodTask(**{**vars(TASK), "steps": 0})
    with pytest.raises(UnknownNameError, match="standard"):
        find_suite("standart")
    with pytest.raises(UnknownNameError, match="adalora-peak"):
        find_method("adalora-pak")
    with pytest.raises(UnknownNameError, match="gpt2"):
        run.chosen_cells(SUITES["quick"], ["bert"])


def test_a_further_policy_is_one_more_row() -> None:
    chosen = run.chosen_methods(SUITES["quick"], ["simple"], ("top-down",))
    assert [method.name for method in chosen] == ["simple", "top-down"]


def test_windows_of_modules() -> None:
    assert window(MODULES, 2, 8).tolist() == [0, 0, 0, 0, 8, 8, 8, 8]
    assert [deepest(MODULES, budget, 8) for budget in ("20%", "60%", "100%")] == [0, 2, 4]
