"""Control of a run: when it acts, what it sees, and what rules and networks answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from rankpilot.decide import rate_control


def record(losses: list[float], alignments: list[float], total: int = 200) -> rate_control.RunRecord:
    found = rate_control.RunRecord(total)
    for loss, aligned in zip(losses, alignments, strict=True):
        found.add(loss, aligned)
    return found


def seen(**values: float) -> Any:
    """An observation; features that are not given are 0, with the whole rate of the schedule after 30 steps."""
    usual = {"schedule": 1.0, "time": 0.17, "steps": math.log2(30 / 5) / 4, "spread_of_the_alignment": 0.2} | values
    known = [name.replace(" ", "_").replace("-", "_") for name in rate_control.FEATURES]
    assert usual.keys() <= {*known}
    return np.array([[usual.get(name, 0.0) for name in known]])


@pytest.mark.parametrize("total", [60, 61, 100, 400, 10_000])
def test_decisions_come_in_the_first_half_and_far_enough_apart(total: int) -> None:
    steps = rate_control.decision_steps(total)
    assert len(steps) == len(rate_control.SHARES)
    assert all(b - a >= rate_control.LEAST_WINDOW for a, b in zip((0, *steps), steps, strict=False))
    assert steps[-1] <= max(0.5 * total, rate_control.LEAST_WINDOW * len(rate_control.SHARES))
    assert steps[-1] < total


def test_a_short_run_is_left_alone() -> None:
    assert rate_control.decision_steps(59) == ()


def test_features_are_those_of_the_window() -> None:
    found = record([4.0, 4.0, 2.0, 2.0], [math.nan, 0.1, 0.3, 0.2])
    first = dict(zip(rate_control.FEATURES, found.observe(0.5), strict=True))
    assert first["alignment"] == pytest.approx(4 * 0.2)
    assert first["alignment over the first"] == pytest.approx(1)
    assert first["loss"] == pytest.approx(2 * (math.log(math.sqrt(8)) - math.log(4)))
    assert first["schedule"] == 0.5
    assert first["warm-up"] == 1
    assert first["time"] == 4 / 200
    found.take(rate_control.CHANGES.index(1.0))
    for _ in range(5):
        found.add(1.0, -0.1)
    second = dict(zip(rate_control.FEATURES, found.observe(1.0), strict=True))
    assert second["moved"] == pytest.approx(1 / 3)
    assert second["warm-up"] == 1
    assert dict(zip(rate_control.FEATURES, found.observe(1.0), strict=True)) == second, "to look changes nothing"
    found.take(rate_control.KEEP)
    found.add(1.0, 0.1)
    assert dict(zip(rate_control.FEATURES, found.observe(0.9), strict=True))["warm-up"] == 0
    assert second["alignment"] == pytest.approx(-0.4)
    assert second["alignment over the first"] == pytest.approx(-0.1 / np.mean([0.1, 0.3, 0.2, -0.1, -0.1]))
    assert second["change of loss"] == pytest.approx(max(4 * -math.log(3), -3))
    assert second["above the best"] == pytest.approx(second["change of loss"])
    assert not second["undone"]


def test_losses_that_are_not_finite_stay_within_the_bounds() -> None:
    values = record([3.0, 3.0, math.inf, math.nan], [0.1] * 4).observe(1.0)
    assert np.isfinite(values).all()
    assert dict(zip(rate_control.FEATURES, values, strict=True))["loss"] == 3.0


def test_what_was_undone_is_no_level_to_compare_with() -> None:
    found = record([3.0, 3.0, 9.0, 9.0], [0.1] * 4)
    found.take(rate_control.UNDO)
    found.add(3.0, 0.1)
    after = dict(zip(rate_control.FEATURES, found.observe(1.0), strict=True))
    assert (after["undone"], after["evidence"]) == (1, 0), "one alignment tells no error"
    assert after["moved"] == pytest.approx(-2 / 3)
    assert after["change of loss"] == pytest.approx(0, abs=1e-12)
    found.take(rate_control.KEEP)
    found.add(3.0, 0.1)
    assert found.observe(1.0)[rate_control.FEATURES.index("undone")] == 1, "it stays"


LOW = {"alignment": 1.0, "alignment_over_the_first": 0.9, "evidence": 2.0}
HIGH = {"alignment": -0.4, "alignment_over_the_first": -0.5, "evidence": -1.0}
RULES = [
    (LOW, 1.0),
    (LOW | {"alignment_over_the_first": 0.4}, 0.5),
    (LOW | {"evidence": 0.25}, 0.0),
    (LOW | {"alignment_over_the_first": 0.2}, 0.5),
    (LOW | {"alignment_over_the_first": 0.2, "evidence": 0.7}, 0.0),
    (LOW | {"alignment_over_the_first": 0.2, "warm_up": 1.0}, 0.0),
    (LOW | {"alignment_over_the_first": 0.1}, 0.0),
    (LOW | {"alignment": 0.07}, 0.0),
    (LOW | {"warm_up": 1.0, "schedule": 0.6}, 0.0),
    (LOW | {"warm_up": 1.0, "schedule": 0.8}, 1.0),
    (LOW | {"warm_up": 1.0, "schedule": 0.8, "alignment_over_the_first": 0.5}, 0.5),
    (LOW | {"warm_up": 1.0, "schedule": 0.8, "alignment_over_the_first": 0.4}, 0.0),
    (LOW | {"steps": 0.0}, 0.0),
    (HIGH, -1.0),
    (HIGH | {"alignment_over_the_first": -1.0}, -2.0),
    (HIGH | {"alignment_over_the_first": -0.25}, -0.5),
    (HIGH | {"alignment_over_the_first": -0.08}, 0.0),
    (HIGH | {"alignment_over_the_first": -0.15}, -0.5),
    (HIGH | {"evidence": -0.2}, 0.0),
    (HIGH | {"warm_up": 1.0, "steps": 0.0}, -1.0),
]
"""Observations, and log2 of the change that the rule makes."""


@pytest.mark.parametrize(("values", "change"), RULES)
def test_the_rule_follows_the_alignment(values: dict[str, float], change: float) -> None:
    (action,) = rate_control.AlignmentRule().act(seen(**values))
    assert action != rate_control.UNDO
    assert rate_control.CHANGES[action] == change


def test_the_rule_goes_back_where_the_loss_has_risen_beyond_its_noise() -> None:
    rule, risen = rate_control.AlignmentRule(), {"alignment": -0.1, "loss": 0.8}
    assert rule.act(seen(**risen)) == [rate_control.UNDO]
    assert rule.act(seen(**risen, noise=2.0)) != [rate_control.UNDO]
    assert rule.act(seen(**risen | {"alignment": 0.1})) != [rate_control.UNDO], "steps that go on do no damage"


def test_the_rule_goes_back_where_the_first_steps_surely_take_back() -> None:
    rule, early = rate_control.AlignmentRule(), HIGH | {"time": 0.1}
    assert rule.act(seen(**early)) == [rate_control.UNDO]
    for values in (
        early | {"time": 0.17},
        early | {"moved": -1 / 3},
        early | {"evidence": -0.3},
        early | {"alignment_over_the_first": -0.15},
        early | {"alignment_over_the_first": -0.3, "evidence": -0.5},
    ):
        assert rule.act(seen(**values)) != [rate_control.UNDO]
