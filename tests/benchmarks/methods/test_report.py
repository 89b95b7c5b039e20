"""The report: every number of docs/results.md."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from rankpilot.errors import ConfigError

from benchmarks.methods import report as report
from benchmarks.methods.numbers import Results
from benchmarks.methods.rows import PACKED

DOCS = Path(__file__).parents[3] / "docs"


@cache
def stored(suite: str) -> Results:
    """What the rows in the repository tell."""
    return report.read_results(report.Options(suite=suite))


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
