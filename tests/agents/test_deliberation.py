"""What a deliberation says of its plans, by hand; and a decision in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.policy import Deliberation, decision_line, plan_distance, unlike
from rankpilot.cost.cost import ParameterCost

from .test_log import make_deliberation, make_problem, make_record

VOTES = np.array([[0.0, 0.5, 0.75, 0.5], [0.0, 0.5, 0.25, 0.25]], dtype=np.float32)
PLANS = np.array([[2, 2, 2], [8, 0, 1], [4, 2, 2], [4, 1, 2]])


def four_plans(**changes: Any) -> Deliberation:
    """Lower bounds 0, .5, .25 and .25; the last two plans are nearer to the first than the best one is."""
    return replace(make_deliberation(plan_of=np.array([0, 1, 2, 3]), plans=PLANS, votes=VOTES), **changes)


def test_bounds_by_hand() -> None:
    deliberation = four_plans()
    assert deliberation.mean.tolist() == [0, 0.5, 0.5, 0.375]
    assert deliberation.std.tolist() == [0, 0, 0.25, 0.125]
    assert deliberation.bound.tolist() == [0, 0.5, 0.25, 0.25]
    assert deliberation.margin == 0.25
    assert replace(deliberation, taken=2).margin == -0.25
    assert replace(deliberation, taken=2, allowed=np.array([True, False, True, True])).margin == 0, "the best cannot be"
    assert replace(deliberation, taken=2, allowed=np.array([False, False, True, False])).margin == 0
    assert deliberation.probabilities.tolist() == [0, 1, 0, 0]
    assert replace(deliberation, lcb_coefficient=3.0).bound.tolist() == [0, 0.5, -0.25, 0]


def test_of_tied_plans_the_nearest_to_the_reference_is_taken() -> None:
    near = plan_distance(PLANS, PLANS[0])
    assert near.argsort().tolist() == [0, 2, 3, 1]
    assert four_plans(tie=0.2).tied.tolist() == [False, True, False, False]
    assert four_plans(tie=0.2).favourite == 1
    assert four_plans(tie=0.25).tied.tolist() == [False, True, True, True]
    assert four_plans(tie=0.25).favourite == 2
    assert four_plans(tie=9.0).tied.tolist() == [False, True, True, True], "the reference is surely worse"


def test_a_plan_that_may_be_worse_than_the_reference_is_not_tied() -> None:
    """Bounds 0, .0625, -.0625 and .03125: the third is nearest, and less than the tie below the best."""
    votes = np.array([[0.0, 0.0625, -0.0625, 0.03125]] * 2, dtype=np.float32)
    unsure = four_plans(votes=votes, tie=0.5)
    assert unsure.tied.tolist() == [False, True, False, True]
    assert unsure.favourite == 3


def test_where_nothing_is_better_the_reference_stays() -> None:
    worse = four_plans(votes=-VOTES, tie=9.0)
    assert worse.tied.tolist() == [True, False, False, False]
    assert worse.favourite == 0


def test_distances_by_hand() -> None:
    assert plan_distance(np.array([1, 3, 0]), np.array([1, 1, 3])) == pytest.approx((0 + 1 + 2) / 3)
    assert plan_distance(PLANS, PLANS[0])[0] == 0


# Runs unlike those that were learned from -----------------------------------------------------------------------------


def test_what_a_run_is_unlike_is_told_as_people_count_it() -> None:
    outside = {"horizon": (1.0, -0.30103, 0.30103), "modules": (0.78, 0.4248, 0.5209), "depth": (0.5, 1.0, 1.0)}
    found = four_plans(outside=outside)
    assert unlike(found) == "1,000 steps (not 50 to 200), 223 modules (not 19 to 37), depth 0.5 (not 1 to 1)"
    assert unlike(four_plans()) == ""
    assert unlike(replace(found, trained=True)) == f"adapters that are trained already, {unlike(found)}"


# A decision in one line -----------------------------------------------------------------------------------------------


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
