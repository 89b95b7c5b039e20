"""A few published peaks, predicted from configurations alone; `python -m benchmarks published` has all."""

from __future__ import annotations

import pytest

from benchmarks.published import (
    CARD_MIB,
    compare_t4,
    quick_rows,
    reserve_on_t4,
    right_verdicts,
    summary,
    t4_rows,
)

from ..cases import first_cases

BARS = {"sdpa none": 0.01, "eager nf4": 0.15, "sdpa nf4": 0.08, "eager none": 0.08}
"""The largest error of the reserve in each setting."""


@pytest.mark.long
def test_published_steps_are_predicted_within_the_bars():
    rows = quick_rows(t4_rows())
    assert len(t4_rows()) == 43
    assert {f"{row.attention} {row.quantization}" for row in rows} == set(BARS)
    runs = [compare_t4(row) for row in rows]
    mean, worst, _ = summary(run.error for run in runs)
    assert mean <= 0.5  # of all rows .3 %
    assert worst <= 1.5
    assert summary(run.error_with_left for run in runs)[2] >= -0.5


@pytest.mark.parametrize(
    ("model", "setting"), first_cases(2, [(model, kind) for model in ("TinyLlama", "SmolLM2") for kind in BARS])
)
def test_published_reserves_and_verdicts_are_predicted(model, setting):
    rows = [row for row in quick_rows(t4_rows()) if model in row.model]
    (run,) = (reserve_on_t4(row) for row in rows if f"{row.attention} {row.quantization}" == setting)
    assert abs(run.compared.error) <= BARS[setting], run.row.name
    assert run.verdict_is_right(CARD_MIB)
    right, of = right_verdicts([run])
    assert right / of >= 0.9
