"""Limits of time as people write them."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.errors import BudgetError
from rankpilot.memory.budget import TimeBudget, reference_seconds
from rankpilot.memory.step_time import StepTime


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ("75%", "share", 0.75),
        (" 110 % ", "share", 1.1),
        ("0.8s", "seconds", 0.8),
        (".5 s", "seconds", 0.5),
        ("800ms", "seconds", 0.8),
        ("1.5 min", "seconds", 90),
        ("2E-1s", "seconds", 0.2),
    ],
)
def test_what_is_read(given, kind, value):
    budget = TimeBudget.parse(given)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))
    assert TimeBudget.parse(str(budget)) == budget == TimeBudget.parse(budget)


@pytest.mark.parametrize("given", ["", "fast", "-1s", "0%", "1 hour", "nan s", "s", "3GiB", None])
def test_what_is_refused(given):
    with pytest.raises(BudgetError, match=r"Cannot read the time .*Allowed: '75%'.*'0.8s'"):
        TimeBudget.parse(given)


@pytest.mark.parametrize(
    ("given", "hint"), [(0.75, "Write '0.75s' or '75%'"), ("1", "'1s' or '100%'"), (80, "Write '80s'. ")]
)
def test_a_number_alone_is_ambiguous(given, hint):
    with pytest.raises(BudgetError, match="has no unit") as error:
        TimeBudget.parse(given)
    assert hint in str(error.value)


def test_a_share_is_one_of_plain_lora():
    nothing = np.zeros(0)
    time = StepTime(
        constant=1.0,
        per_rank=np.array([0.01, 0.1]),
        adapters=np.array([0.2, 0.3]),
        groups=nothing,
        needs=np.zeros((0, 2), dtype=bool),
        layers=("a",),
        running_again=("a",),
        layer_seconds=np.array([100.0]),
        layer_needs=np.array([[True, True]]),
        layer_of=np.array([0, 0]),
        again=np.zeros(2),
        again_per_rank=np.zeros(2),
    )
    most = np.array([64, 4])
    assert reference_seconds(time, most) == pytest.approx(1 + 0.5 + 8 * 0.01 + 4 * 0.1), "no layer runs again"
    assert TimeBudget.parse("50%").resolve(time, most) == pytest.approx(0.99)
    assert TimeBudget.parse("3s").resolve(time, most) == 3
