"""What is chosen from plans of known losses, spreads and costs: the decision and its promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.decide.choice import PLAIN, Choice, percent
from rankpilot.decide.plan.goal import CAUTION, GOALS, SURE, Goal
from rankpilot.decide.plan.worth import FEATURES


def choice(expected, *, spread=None, costs=None, seconds=None, plain_fits=True, goal=Goal()) -> Choice:  # noqa: B008
    """Plain LoRA and other plans of two modules, of which the best is taken; the last feature makes the loss."""
    count = len(expected) + 1
    parts = np.zeros((count, len(FEATURES)))
    parts[1:, -1] = expected
    found = Choice(
        names=(PLAIN, *(f"plan {number}" for number in range(1, count))),
        plans=np.stack([np.arange(count) + 8, np.full(count, 8)], axis=1), parts=parts, goal=goal,
        spread=np.array([0.0, *(spread or [0.0] * (count - 1))]), fits=np.array([plain_fits] + [True] * (count - 1)),
        costs=np.array(costs or range(count, 0, -1), dtype=np.float64),
        seconds=None if seconds is None else np.array(seconds),
    )  # fmt: skip
    return replace(found, taken=found.best)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Any choice under any goal; of few numbers, so that there are ties."""
    count = draw(st.integers(0, 6))

    def some(values: Any, more: int = 0) -> list[float]:
        return draw(st.lists(values, min_size=count + more, max_size=count + more))

    costs = st.sampled_from([100.0, 100.5, 102.0, 150.0, 300.0])
    return choice(
        some(st.sampled_from([-0.1, -0.02, -0.01, 0.0, 0.005, 0.01, 0.1])),
        spread=some(st.sampled_from([0.001, 0.005, 0.01, 0.1])),
        costs=some(costs, 1),
        seconds=some(costs, 1),
        plain_fits=draw(st.booleans()) or count == 0,
        goal=Goal(draw(st.sampled_from(GOALS)), draw(st.sampled_from([0.0, 0.01, 0.05]))),
    )


# What is taken --------------------------------------------------------------------------------------------------------


def test_a_goal_that_cannot_be_kept() -> None:
    found = choice([0.05, 0.03], spread=[0.0, 0.06], plain_fits=False, goal=Goal("bytes", 0.02))
    assert found.misses_goal
    assert found.taken == 1, "the lowest loss, with caution"
    assert found.promise() == (
        "The goal cannot be met: rank 8 on all modules does not fit the budget or bounds, and no "
        "plan that fits is very likely to stay within +2.0 % of its loss. A larger budget or "
        "tolerance helps."
    )


@given(choices())
def test_the_decision_is_that_of_a_direct_search(found: Choice) -> None:
    allowed = [plan for plan in range(len(found.plans)) if found.fits[plan]]
    reach = (SURE if found.goal.saves else CAUTION) * found.spread
    surely = found.parts.sum(axis=1) + reach
    within = [plan for plan in allowed if surely[plan] <= found.goal.tolerance]
    assert found.misses_goal == (found.goal.saves and not within)
    assert found.fits[found.taken]
    if found.goal.saves and within:
        assert found.seconds is not None
        costs = found.seconds if found.goal.kind == "time" else found.costs
        tied = [plan for plan in within if costs[plan] <= 1.01 * min(costs[plan] for plan in within)]
        assert found.taken in tied
        assert found.expected[found.taken] == min(found.expected[plan] for plan in tied)
    else:
        assert surely[found.taken] == min(surely[plan] for plan in allowed)
        assert found.taken == 0 or not found.fits[0] or surely[found.taken] < 0


# In words -------------------------------------------------------------------------------------------------------------


def test_promises() -> None:
    better = choice([-0.02], spread=[0.01])
    assert better.promise() == "Expected versus rank 8 on all modules: loss -2.0 %, very likely at most -0.2 %."
    short = choice([0.03], spread=[0.02], plain_fits=False)
    assert short.promise() == (
        "Expected versus rank 8 on all modules, which does not fit: loss +3.0 %, very likely at most +6.8 %."
    )
    assert choice([0.03]).promise().startswith("No plan that fits is clearly better")
    assert choice([]).promise() == ""
    assert choice([0.03], goal=Goal("time", 0.02), seconds=[2.0, 1.0]).promise() == (
        "No cheaper plan is very likely to stay within +2.0 % of the loss of rank 8 on all modules."
    )
    saves = choice([0.001], goal=Goal("bytes"))
    assert saves.promise() == "Expected versus rank 8 on all modules: loss +0.1 %, very likely at most +0.1 %."


def test_much_is_lost_for_lack_of_room() -> None:
    assert choice([0.02], plain_fits=False).lacks_room
    assert not choice([0.005], plain_fits=False).lacks_room
    assert not choice([-0.02]).lacks_room
    assert not choice([0.02], plain_fits=False, goal=Goal("bytes", 0.05)).lacks_room


@pytest.mark.parametrize(("log_loss", "text"), [(0.0, "+0.0 %"), (-0.05, "-4.9 %"), (np.log(1.012), "+1.2 %")])
def test_log_losses_as_people_read_them(log_loss: float, text: str) -> None:
    assert percent(log_loss) == text
