"""Many targets side by side: a table with figures or refusals, and agreement with the truth."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rankpilot.common.statistics import Estimate
from rankpilot.study.off_policy.compare import TargetResult, accuracy_of, compare_targets, comparison_table
from rankpilot.study.off_policy.estimates import PolicyEstimate
from rankpilot.study.off_policy.targets import TargetPolicy
from rankpilot.study.off_policy.weighted import doubly_robust
from rich.console import Console

from .small_logs import PAIRS, pairs, target, unknown

NEVER_DRAWN = TargetPolicy("never [drawn]", np.tile([0.0, 1.0, 0.0, 0.0, 1.0], PAIRS))
SAME = TargetPolicy("same", np.tile([0.8, 0.2, 0.4, 0.5, 0.1], PAIRS))


def shown(results: list[TargetResult], truth: dict[str, float] | None = None) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison_table(results, truth))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_method_that_applies() -> None:
    results = compare_targets(pairs(), [target(), SAME])
    assert [result.target for result in results] == ["target", "same"]
    methods = ["restricted choice", "direct", "importance", "self-normalised", "doubly robust"]
    assert all(list(result.estimates) == methods for result in results)
    assert all(name == estimate.method for result in results for name, estimate in result.estimates.items())
    assert results[0].estimates["doubly robust"] == doubly_robust(pairs(), target())
    (without,) = compare_targets(replace(pairs(), predictions=None), [target()])
    assert list(without.estimates) == ["restricted choice", "importance", "self-normalised"]


def test_the_table_shows_figures_with_both_figures_of_overlap() -> None:
    text = shown(compare_targets(pairs(), [target()]))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    expected = ("no choice", "+1.700 (", "+3.250 (", "+2.600 (", "+2.825 (")
    assert len(rows) == len(expected)
    for row, part in zip(rows, expected, strict=True):
        assert part in row
    assert "target" in rows[0]
    assert "11.8" in rows[0]
    assert "3.0" in rows[0]
    assert "direct *" in rows[1], "it tells that this one leaves something out"
    assert "* its interval leaves out the error of the model" in text


def test_the_table_shows_no_figure_beside_a_refusal() -> None:
    text = shown(compare_targets(replace(pairs(), predictions=None), [NEVER_DRAWN]))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert "never [drawn]" in rows[0]
    assert sum(row.count("not enough overlap") for row in rows) == 2
    assert not any("(" in row for row in rows), "no interval"
    assert "0.0" in rows[0]
    assert "10.0" in rows[0]
    hidden = shown(compare_targets(unknown(pairs()), [target()]))
    row = next(line for line in hidden.splitlines() if "│ target" in line)
    assert row.count("unknown") == 2


def test_the_table_tells_how_estimates_rank_targets() -> None:
    results = compare_targets(pairs(), [target(), SAME])
    lines = shown(results, {"target": 3.0, "same": 2.0}).splitlines()
    assert "+3.000" in next(line for line in lines if "│ target" in line)
    start = next(number for number, line in enumerate(lines) if "rank correlation" in line)
    assert "".join(lines[start:]).count("1.00") == 4, "all but one without figures"


def made(name: str, gain: Estimate | None) -> TargetResult:
    refused = None if gain else "Not enough overlap: made up."
    return TargetResult(name, {"doubly robust": PolicyEstimate("doubly robust", gain, refused, "all", None)})


def test_agreement_with_the_truth_by_hand() -> None:
    results = [
        made("a", Estimate(1.0, 0.5, 1.5)),
        made("b", Estimate(3.0, 2.0, 4.0)),
        made("c", Estimate(2.0, 1.9, 2.1)),
        made("d", None),
    ]
    found = accuracy_of(results, {"a": 1.5, "b": 2.0, "c": 5.0, "d": 0.0}, "doubly robust")
    assert (found.estimated, found.refused) == (3, 1)
    assert found.covered == pytest.approx(2 / 3), "ends count as inside"
    assert found.width == pytest.approx(1.0)
    assert found.rank_correlation == pytest.approx(0.5)


def test_agreement_of_refusals_alone() -> None:
    found = accuracy_of([made("a", None)], {"a": 1.0}, "doubly robust")
    assert (found.estimated, found.refused) == (0, 1)
    assert np.isnan([found.covered, found.width, found.rank_correlation]).all()
