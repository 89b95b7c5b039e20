"""The report: figures from rows that are made up, every number of docs/results.md."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rankpilot.errors import ConfigError

from benchmarks.methods import report as report
from benchmarks.methods import run
from benchmarks.methods.numbers import KINDS, Results, compare, costs_of, profile, time_to_loss
from benchmarks.methods.registry import METHODS
from benchmarks.methods.rows import PACKED
from benchmarks.methods.study import Study
from benchmarks.methods.tasks import Cell, Suite

from .made_up import SUITE, TASK, new_study, row_of

DOCS = Path(__file__).parents[3] / "docs"
NAMES = ("simple", "top-down", "random", "ours", "adalora-peak", "miss")


def filled(gains: dict[str, float], names: tuple[str, ...] = NAMES) -> Study:
    study = new_study()
    for cell in SUITE.cells:
        while missing := run.missing_work(study, cell, [METHODS[name] for name in names]):
            for work in missing:
                study.rows.add(work, row_of(work, gains))
    return study


def results(gains: dict[str, float], names: tuple[str, ...] = NAMES) -> Results:
    return Results.of(filled(gains, names), [METHODS[name] for name in names])


@cache
def stored(suite: str) -> Results:
    """What the rows in the repository tell."""
    return report.read_results(report.Options(suite=suite))


def test_gains_are_paired_differences_of_logs() -> None:
    found = results({"pilot": 0.1})
    one = compare(found, "ours", "simple")
    assert one is not None
    assert one.gain.value == pytest.approx(0.1)
    assert (one.pairs.wins, one.pairs.losses, one.cells) == (4, 0, 2)
    back = compare(found, "simple", "ours")
    assert back is not None
    assert back.mean.value == pytest.approx(-0.1)
    assert compare(found, "miss", "simple") is None, "it fits no cell of GPT-2"


def test_the_same_plan_is_a_tie() -> None:
    one = compare(results({}), "top-down", "random")
    assert one is not None
    assert (one.pairs.wins, one.pairs.ties, one.pairs.losses) == (0, 4, 0)


def test_a_run_that_diverged_counts_as_untrained() -> None:
    study = filled({})
    outcome = METHODS["ours"].outcome(study, SUITE.cells[0])
    study.rows.add(outcome.works[0], {**outcome.rows[0], "loss": None, "accuracy": None})
    found = Results.of(study, [METHODS[name] for name in NAMES])
    one, costs = compare(found, "ours", "simple"), costs_of(found, "ours")
    assert one is not None
    assert one.worst == pytest.approx(np.log(outcome.rows[0]["loss"] / 9))
    assert costs is not None
    assert costs.diverged == 1


def test_costs() -> None:
    costs = costs_of(results({}), "top-down")
    assert costs is not None
    assert costs.bytes == pytest.approx(266 / 514)
    assert costs.setup == pytest.approx(200), "the plan took 2 s, and a step of the reference 0.01"
    assert costs.breaches == 0
    assert costs.tuning == pytest.approx(3 * 3 / 3600), "three rates of one plan"


def test_time_to_a_loss() -> None:
    reached = time_to_loss(results({"pilot": 0.5}), "ours")
    assert reached is not None
    time, there, runs = reached
    assert (there, runs) == (4, 4)
    assert 0.1 / 0.01 / (8 * 0.7) < time < 0.1 / 0.01 / (8 * 0.7) + 1


def test_profiles_rise_to_the_share_of_what_fits() -> None:
    found = results({"adalora": -0.1})
    shares = profile(found, "adalora-peak", np.array([0.0, 0.05, 0.2]))
    assert shares.tolist() == [0, 0, 1]


def test_kinds_of_tasks_stand_apart() -> None:
    assert report.kinds_table(results({})) == "", "all cells are of one kind"
    found = stored("standard")
    parts = [found.of_kind(kind) for kind in KINDS]
    assert sum(len(part.cells) for part in parts) == len(found.cells)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.kinds_table(found).splitlines()]
    (row,) = (line for line in lines if line[0] == "ours")
    assert len(row) == len(lines[0]) == 1 + 3 * len(parts)
    for part, count in zip(parts, row[1::3], strict=True):
        one = compare(part, "ours", "simple")
        assert one is not None
        assert count == f"{one.cells}"
    assert "simple" not in {line[0] for line in lines}, "nothing is told of it beside itself"


def test_a_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = replace(SUITE, quick=True)
    monkeypatch.setattr(report, "find_suite", lambda name: suite)
    packed = tmp_path / "rows.parquet"
    names = tuple(name for name, method in METHODS.items() if method.quick)
    filled({"pilot": 0.1}, names).rows.pack(packed)
    options = report.Options(packed=packed, output=tmp_path / "report")
    figures = report.benchmark(options, report.Console(quiet=True))
    assert figures["ours.mean_gain"] == pytest.approx(0.1)
    text = (options.output / "results.md").read_text()
    assert (
        "`ours` against `simple`, 2 cells: 1 task, too few to tell; mean gain in log loss +10.0 (+10.0 to +10.0) %"
        in text
    )
    assert "## Limits" in text
    for name in ("methods_time", "methods_bytes", "methods_profiles"):
        assert (options.output / f"{name}.png").stat().st_size > 10_000
    first = (options.output / "results.md").read_bytes()
    report.benchmark(options, report.Console(quiet=True))
    assert (options.output / "results.md").read_bytes() == first


def test_no_rows_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite((Cell(TASK, "50%"),), (1,), (101,), 2)
    monkeypatch.setattr(report, "find_suite", lambda name: suite)
    with pytest.raises(ConfigError, match="There are no rows of the suite"):
        report.read_results(report.Options())


def test_docs_results_is_what_the_stored_rows_say() -> None:
    """Every number in docs/results.md comes from the rows in the repository."""
    written = (DOCS / "results.md").read_text()
    suite = written.partition("--suite ")[2].partition("`")[0]
    options = report.Options(suite=suite, output=DOCS, images=DOCS / "images")
    assert PACKED.is_file()
    results = stored(suite)
    blocks = report.report_blocks(options, results, *report.summary(results))
    assert written == "\n\n".join(blocks) + "\n"


def test_a_folder_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no rows\.jsonl"):
        report.read_results(report.Options(rows=tmp_path))
    with pytest.raises(ConfigError, match="no packed file of rows"):
        report.read_results(report.Options(packed=tmp_path / "rows.parquet"))
