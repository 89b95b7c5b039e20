"""The report: figures from rows that are made up, every number of docs/results.md."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from rankpilot.errors import ConfigError

from benchmarks.methods import report as report
from benchmarks.methods import run
from benchmarks.methods.numbers import Results
from benchmarks.methods.registry import METHODS
from benchmarks.methods.rows import PACKED
from benchmarks.methods.study import Study
from benchmarks.methods.tasks import Cell, Suite

from .made_up import SUITE, TASK, new_study, row_of

DOCS = Path(__file__).parents[3] / "docs"


def filled(gains: dict[str, float], names: tuple[str, ...]) -> Study:
    study = new_study()
    for cell in SUITE.cells:
        while missing := run.missing_work(study, cell, [METHODS[name] for name in names]):
            for work in missing:
                study.rows.add(work, row_of(work, gains))
    return study


@cache
def stored(suite: str) -> Results:
    """What the rows in the repository tell."""
    return report.read_results(report.Options(suite=suite))


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
