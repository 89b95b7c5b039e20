"""Budgets, times, bounds and schedules as people or files give them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.common.files import from_json
from rankpilot.cost.budget import Budget, TimeBudget
from rankpilot.errors import BudgetError, ConfigError
from rankpilot.finetune.options import rank_bounds_of
from rankpilot.lora.spec import ModuleSpec
from rankpilot.plan.problem import rank_bounds

from .damage import edited, odd_values
from .running import fuzz

PARTS = [
    *"0123456789.,_ eE-+%",
    "e9",
    "1e308",
    "gib",
    "ib",
    "mb",
    "bytes",
    " total",
    "k params",
    "auto",
    "ms",
    "min",
    "٣",
    "\n",
]

words = st.one_of(st.lists(st.sampled_from(PARTS), max_size=9).map("".join), st.text(max_size=20), odd_values)

MODULES = [ModuleSpec(f"layers.{index // 2}.{'qv'[index % 2]}_proj", index // 2, 32, 16) for index in range(6)]

SCHEDULE = {"probe_steps": 40, "probe_batch": 2, "fractions": [0.0, 0.18, 0.34, 0.5], "max_step": 2}


@fuzz(words, examples=300)
def test_budgets(given: Any) -> None:
    budget = Budget.parse(given)
    assert 0 < budget.value < float("inf")
    if budget.kind == "share" or budget.value >= 1e6:  # smaller ones are written as whole numbers
        again = Budget.parse(str(budget))
        assert (again.kind, again.value) == (budget.kind, pytest.approx(budget.value, rel=1e-5))


@fuzz(words, examples=300)
def test_times(given: Any) -> None:
    budget = TimeBudget.parse(given)
    assert 0 < budget.value < float("inf")


@fuzz(
    st.lists(st.one_of(words.map(str), st.builds("{}={}".format, st.sampled_from(["q_proj", "x", ""]), words))),
    examples=200,
)
def test_bounds_as_text(given: list[str]) -> None:
    rank_bounds(MODULES, rank_bounds_of(tuple(given)))


@fuzz(
    st.dictionaries(
        st.sampled_from(["q_proj", "0.v_proj", "x"]), st.one_of(odd_values, st.tuples(odd_values, odd_values))
    ),
    examples=200,
)
def test_bounds_as_values(given: dict[str, Any]) -> None:
    low, high = rank_bounds(MODULES, given)
    assert low.min() >= 0
    assert high.min() >= 0


@fuzz(edited(SCHEDULE), examples=300)
def test_schedules(given: Any) -> None:
    schedule = from_json(DecisionSchedule, given, complete=True)
    steps = schedule.steps(200)
    assert steps[0] == 0
    assert len(steps) <= 200


HUGE = pytest.param(10**5000, id="huge")


@pytest.mark.parametrize(
    "given", ["5ib", HUGE, "9" * 5000, "1e308 tib", "1e-320%", "1" * 61, "1.5.2 MB", "1e999 params"]
)
def test_budgets_that_were_once_read_or_fell_over(given: Any) -> None:
    with pytest.raises(BudgetError, match="Cannot read the budget"):
        Budget.parse(given)


@pytest.mark.parametrize("given", [HUGE, "1e308min", "1e-400s", "9" * 5000 + "s"])
def test_times_that_were_once_read_or_fell_over(given: Any) -> None:
    with pytest.raises(BudgetError, match="Cannot read the time"):
        TimeBudget.parse(given)


def test_bounds_that_fell_over() -> None:
    for entry in ("q_proj=" + "9" * 5000, "q_proj=99999999999"):
        with pytest.raises(ConfigError, match="A bound has the form"):
            rank_bounds_of((entry,))
    with pytest.raises(ConfigError, match="from 0 to 2,147,483,647"):
        rank_bounds(MODULES, {"q_proj": 2**63})
