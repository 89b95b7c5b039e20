"""A few published peaks, predicted from configurations alone; `python -m benchmarks published` has all."""

from __future__ import annotations

import pytest

from benchmarks.published import Compared, compare_t4, quick_rows, summary, t4_rows


@pytest.mark.long
def test_published_steps_are_predicted_within_the_bars():
    rows = quick_rows(t4_rows())
    assert {(row.attention, row.quantization) for row in rows} == {
        (attention, quantization) for attention in ("eager", "sdpa") for quantization in ("none", "nf4")
    }
    runs = [compare_t4(row) for row in rows]
    mean, worst, _ = summary(run.error for run in runs)
    assert mean <= 0.5  # of all rows .3 %
    assert worst <= 1.5
    assert summary(run.error_with_left for run in runs)[2] >= -0.5


def test_all_rows_are_there_and_errors_are_relative():
    assert len(t4_rows()) == 43
    run = Compared("", 99.0, 100.0, 2.0)
    assert (round(run.error, 6), round(run.error_with_left, 6)) == (-0.01, 0.01)
    assert summary([0.01, -0.03]) == (2.0, 3.0, -3.0)
