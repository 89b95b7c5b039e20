"""What the pages claim of saved time and memory is what stored rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods import report as report
from benchmarks.methods.numbers import Results
from benchmarks.methods.saving import (
    saving_blocks,
    saving_of,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def stored() -> Results:
    """What the rows in the repository say of the suite."""
    return report.read_results(report.Options(suite="saving"))


def test_docs_saving_is_what_the_stored_rows_say(stored: Results) -> None:
    """Every number in docs/saving.md comes from the rows in the repository."""
    page = Path(__file__).parents[3] / "docs" / "saving.md"
    assert page.read_text() == "\n\n".join(saving_blocks(stored, "images/saving.png")) + "\n"


def test_what_pages_claim_of_rank_and_depth(stored: Results) -> None:
    plans, memory, choose = (
        " ".join((ROOT / "docs" / f"{name}.md").read_text().split()) for name in ("plan-cost", "memory", "choose")
    )
    for name, words in (("attention-8", "attention alone loses"), ("mlp-8", "MLPs alone")):
        found = saving_of(stored, name)
        assert found is not None
        low, high = (f"{100 * bound:+.1f}" for bound in (found.loss.low, found.loss.high))
        assert f"{words} {100 * found.loss.value:+.1f} % ({low} to {high})" in choose
    for name, words in (
        ("everything-2", "rank 2 on all modules"),
        ("top-three-quarters-8", "rank 8 on the top three quarters of the layers"),
        ("top-half-8", "rank 8 on the top half"),
        ("top-quarter-8", "rank 8 on the top quarter"),
    ):
        found = saving_of(stored, name)
        assert found is not None
        size, step = f"{found.bytes.value:.2f}", f"{found.step.value:.2f}"
        assert f"| {words} | {size} | {step} | {100 * found.loss.value:+.1f} % | {found.cells} |" in plans
        if name == "top-three-quarters-8":
            assert f"{size} of the bytes and {step} of the time, at {100 * found.loss.value:+.1f} %" in choose
        if name == "everything-2":
            assert f"rank 2 on all modules takes {found.bytes.value:.0%} of the bytes".replace("%", " %") in memory
        if name == "top-half-8":
            assert f"rank 8 on the top half of the layers {found.bytes.value:.0%}".replace("%", " %") in memory
            assert f"the top half loses {100 * found.loss.value:+.1f} %" in choose
