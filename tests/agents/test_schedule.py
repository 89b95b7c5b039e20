"""When ranks are decided, and how far a decision may go."""

from __future__ import annotations

import pytest
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.errors import ConfigError


def test_only_the_first_decision_may_use_the_whole_ladder() -> None:
    schedule = DecisionSchedule(max_step=3)
    assert [schedule.reach(decision) for decision in range(4)] == [None, 3, 3, 3]


def test_steps_rise_and_those_that_fall_together_merge() -> None:
    schedule = DecisionSchedule(fractions=(0.0, 0.18, 0.34, 0.5))
    assert schedule.steps(200) == (0, 36, 68, 100)
    assert schedule.steps(4) == (0, 1, 2)


@pytest.mark.parametrize(
    "options",
    [{"probe_steps": 0}, {"probe_batch": 0}, {"max_step": 0}, {"fractions": (0.1, 0.5)}, {"fractions": (0.0, 1.0)}],
    ids=str,
)
def test_values_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="got"):
        DecisionSchedule(**options)
