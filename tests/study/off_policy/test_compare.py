"""Many targets side by side: a table with figures or refusals."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from rankpilot.study.off_policy.compare import TargetResult, compare_targets, comparison_table
from rankpilot.study.off_policy.targets import TargetPolicy
from rankpilot.study.off_policy.weighted import doubly_robust
from rich.console import Console

from .small_logs import PAIRS, pairs, target, unknown

NEVER_DRAWN = TargetPolicy("never [drawn]", np.tile([0.0, 1.0, 0.0, 0.0, 1.0], PAIRS))
SAME = TargetPolicy("same", np.tile([0.8, 0.2, 0.4, 0.5, 0.1], PAIRS))


def shown(results: list[TargetResult]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison_table(results))
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
