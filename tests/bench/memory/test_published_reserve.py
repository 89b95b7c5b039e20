"""A few published reserves, predicted from configurations alone; `rankpilot bench published` has all."""

from __future__ import annotations

import pytest
from rankpilot.bench.memory.published_peaks import quick_rows, t4_rows
from rankpilot.bench.memory.published_reserve import CARD_MIB, reserve_on_t4, right_verdicts

from ...cases import first_cases


@pytest.mark.parametrize("model", first_cases(1, ["TinyLlama", "SmolLM2"]))
def test_published_reserves_and_verdicts_are_predicted(model):
    runs = [reserve_on_t4(row) for row in quick_rows(t4_rows()) if model in row.model]
    bars = {"sdpa none": 0.01, "sdpa nf4": 0.08, "eager none": 0.08, "eager nf4": 0.15}
    assert {run.kind for run in runs} == set(bars)
    for run in runs:
        assert abs(run.compared.error) <= bars[run.kind], run.row.name
        assert run.verdict_is_right(CARD_MIB)
    right, of = right_verdicts(runs)
    assert right / of >= 0.9
