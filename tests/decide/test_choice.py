"""What is chosen from plans of known losses, spreads and costs: the decision, its promise and its frontier."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.decide.choice import PLAIN, Choice, frontier, percent
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
        "The goal cannot be met: rank 8 on all modules does not fit the budget, time or bounds, and no "
        "plan that fits is very likely to stay within +2.0 % of its loss. A larger budget, time or "
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


# The frontier ---------------------------------------------------------------------------------------------------------


def test_a_frontier_by_hand() -> None:
    """Plan 2 is dearer than plan 3 and no better; plan 4 is the cheapest, and worse."""
    found = choice([-0.02, 0.01, 0.01, 0.05], spread=[0.01, 0.01, 0.001, 0.01], costs=[5.0, 9.0, 4.0, 3.0, 1.0])
    rows = frontier(found)
    assert [row.name for row in rows] == ["plan 4", "plan 3", PLAIN, "plan 1"]
    assert [row.verdict for row in rows] == ["worse", "worse", "tie", "better"]
    assert [row.taken for row in rows] == [False, False, False, True]
    best = rows[-1]
    reach = SURE * 0.01
    assert (best.loss, best.low, best.high) == pytest.approx(tuple(np.exp([-0.02, -0.02 - reach, -0.02 + reach])))
    assert (rows[2].loss, rows[2].low, rows[2].high) == (1, 1, 1)
    assert (best.cost, best.seconds, best.fits) == (9, None, True)
    np.testing.assert_array_equal(best.ranks, found.plans[1])


@given(choices())
def test_the_frontier_is_what_no_other_plan_beats(found: Choice) -> None:
    rows = frontier(found)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert [row.name for row in rows if row.taken] == [found.names[found.taken]]
    assert PLAIN in names
    assert next(row for row in rows if row.name == PLAIN).fits == found.fits[0]
    costs = [row.seconds if found.goal.kind == "time" else row.cost for row in rows]
    assert costs == sorted(costs)  # type: ignore[type-var]
    assert all(row.low <= row.loss <= row.high for row in rows)
    others = [row for row in rows if row.name not in (PLAIN, found.names[found.taken])]
    assert all(dear.loss < cheap.loss for cheap, dear in pairwise(others))
    places = set(map(found.names.index, names))
    for plan in np.flatnonzero(found.fits).tolist():
        no_dearer = [other for other in np.flatnonzero(found.fits) if found.goal_costs[other] <= found.goal_costs[plan]]
        beaten = [other for other in no_dearer if found.expected[other] <= found.expected[plan] and other != plan]
        assert plan in places or beaten
        if plan in places - {0, found.taken}:
            assert all(
                (found.expected[other], found.goal_costs[other]) == (found.expected[plan], found.goal_costs[plan])
                for other in beaten
            )
