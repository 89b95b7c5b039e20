"""From rows to outcomes: what is missing, tuning, shared rows, budgets; which methods there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods import run
from benchmarks.methods.registry import METHODS
from benchmarks.methods.rows import RowStore, Work
from benchmarks.methods.study import DoesNotFitError, Study
from benchmarks.methods.tasks import SUITES, Cell

from .made_up import SUITE, TASK, new_study, row_of


def fill(study: Study, name: str, cell: Cell, gains: dict[str, float]) -> list[Work]:
    """Run a method on rows that are made up, until nothing is missing; returns all work."""
    works: list[Work] = []
    while missing := run.missing_work(study, cell, [METHODS[name]]):
        works += missing
        for work in missing:
            study.rows.add(work, row_of(work, gains))
    return works


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


def test_what_does_not_fit_is_not_run() -> None:
    study = new_study()
    assert [work.kind for work in fill(study, "all-linear-8", SUITE.cells[0], {})] == ["costs"]
    with pytest.raises(DoesNotFitError):
        METHODS["all-linear-8"].outcome(study, SUITE.cells[0])


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


def test_test_cells_and_validation_cells_share_no_data() -> None:
    own = {cell.task.data for cell in SUITES["validation"].cells}
    for name in ("quick", "standard", "full"):
        assert not own & {cell.task.data for cell in SUITES[name].cells}
    assert len(SUITES["standard"].cells) >= 12
    assert len(SUITES["standard"].seeds) >= 5
    assert {cell.name for cell in SUITES["standard"].cells} <= {cell.name for cell in SUITES["full"].cells}
