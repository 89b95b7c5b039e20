"""A few published reserves, predicted from configurations alone; `python -m benchmarks published` has all."""

from __future__ import annotations

import pytest

from benchmarks.published import CARD_MIB, quick_rows, reserve_on_t4, right_verdicts, t4_rows

from ..cases import first_cases

BARS = {"sdpa none": 0.01, "sdpa nf4": 0.08, "eager none": 0.08, "eager nf4": 0.15}
"""The largest error of each setting."""

SETTINGS = ["sdpa none", "eager nf4", "sdpa nf4", "eager none"]


@pytest.mark.parametrize(
    ("model", "setting"), first_cases(2, [(model, kind) for model in ("TinyLlama", "SmolLM2") for kind in SETTINGS])
)
def test_published_reserves_and_verdicts_are_predicted(model, setting):
    rows = [row for row in quick_rows(t4_rows()) if model in row.model]
    assert {f"{row.attention} {row.quantization}" for row in rows} == set(BARS) == set(SETTINGS)
    (run,) = (reserve_on_t4(row) for row in rows if f"{row.attention} {row.quantization}" == setting)
    assert run.kind == setting
    assert abs(run.compared.error) <= BARS[setting], run.row.name
    assert run.verdict_is_right(CARD_MIB)
    right, of = right_verdicts([run])
    assert right / of >= 0.9
