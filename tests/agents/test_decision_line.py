"""A decision in one line."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.agents.policy import decision_line
from rankpilot.cost.cost import ParameterCost

from .test_log import make_problem, make_record

GIB = 2**30
BEFORE = np.array([8, 8, 8, 8])


@pytest.mark.parametrize(
    ("after", "cost", "limit", "unit", "line"),
    [
        ([16, 4, 8, 8], 12.1 * GIB, 12.3 * GIB, "bytes", "2 modules moved, 12.1 of 12.3 GiB, mean rank 9.0"),
        ([8, 8, 8, 0], 0.5 * GIB, 1.5 * GIB, "bytes", "1 module moved, 0.5 of 1.5 GiB, mean rank 6.0"),
        ([8, 8, 8, 8], 900 * 2**20, 1000 * 2**20, "bytes", "no module moved, 900 of 1,000 MiB, mean rank 8.0"),
        ([1, 1, 1, 2], 240_000, 300_000, "parameters", "4 modules moved, 240,000 of 300,000 parameters, mean rank 1.2"),
    ],
)
def test_line(after: list[int], cost: float, limit: float, unit: str, line: str) -> None:
    assert decision_line(28, BEFORE, np.array(after), cost, limit, unit) == f"step 28: {line}"


def test_line_of_a_record() -> None:
    assert make_record(1).line() == "step 36: 3 modules moved, 858 of 954 MiB, mean rank 2.3"
    problem = make_problem(cost=ParameterCost(np.array([[100.0, 200.0, 300.0]])), limit=1800.0)
    record = make_record(1, problem=problem, predicted_cost=1500.0)
    assert record.line() == "step 36: 3 modules moved, 1,500 of 1,800 parameters, mean rank 2.3"
