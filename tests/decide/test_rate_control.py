"""Control of a run: when it acts, what it sees, and what rules and networks answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from rankpilot.decide.rate_control import (
    CHANGES,
    FEATURES,
    KEEP,
    LEAST_WINDOW,
    SHARES,
    UNDO,
    AlignmentRule,
    RunRecord,
    decision_steps,
)


def record(losses: list[float], alignments: list[float], total: int = 200) -> RunRecord:
    found = RunRecord(total)
    for loss, aligned in zip(losses, alignments, strict=True):
        found.add(loss, aligned)
    return found


def seen(**values: float) -> Any:
    """An observation; features that are not given are 0, with the whole rate of the schedule after 30 steps."""
    usual = {"schedule": 1.0, "time": 0.17, "steps": math.log2(30 / 5) / 4, "spread_of_the_alignment": 0.2} | values
    known = [name.replace(" ", "_").replace("-", "_") for name in FEATURES]
    assert usual.keys() <= {*known}
    return np.array([[usual.get(name, 0.0) for name in known]])


@pytest.mark.parametrize("total", [60, 61, 100, 400, 10_000])
def test_decisions_come_in_the_first_half_and_far_enough_apart(total: int) -> None:
    steps = decision_steps(total)
    assert len(steps) == len(SHARES)
    assert all(b - a >= LEAST_WINDOW for a, b in zip((0, *steps), steps, strict=False))
    assert steps[-1] <= max(0.5 * total, LEAST_WINDOW * len(SHARES))
    assert steps[-1] < total


def test_a_short_run_is_left_alone() -> None:
    assert decision_steps(59) == ()


def test_features_are_those_of_the_window() -> None:
    found = record([4.0, 4.0, 2.0, 2.0], [math.nan, 0.1, 0.3, 0.2])
    first = dict(zip(FEATURES, found.observe(0.5), strict=True))
    assert first["alignment"] == pytest.approx(4 * 0.2)
    assert first["alignment over the first"] == pytest.approx(1)
    assert first["loss"] == pytest.approx(2 * (math.log(math.sqrt(8)) - math.log(4)))
    assert first["schedule"] == 0.5
    assert first["warm-up"] == 1
    assert first["time"] == 4 / 200
    found.take(CHANGES.index(1.0))
    for _ in range(5):
        found.add(1.0, -0.1)
    second = dict(zip(FEATURES, found.observe(1.0), strict=True))
    assert second["moved"] == pytest.approx(1 / 3)
    assert second["warm-up"] == 1
    assert dict(zip(FEATURES, found.observe(1.0), strict=True)) == second, "to look changes nothing"
    found.take(KEEP)
    found.add(1.0, 0.1)
    assert dict(zip(FEATURES, found.observe(0.9), strict=True))["warm-up"] == 0
    assert second["alignment"] == pytest.approx(-0.4)
    assert second["alignment over the first"] == pytest.approx(-0.1 / np.mean([0.1, 0.3, 0.2, -0.1, -0.1]))
    assert second["change of loss"] == pytest.approx(max(4 * -math.log(3), -3))
    assert second["above the best"] == pytest.approx(second["change of loss"])
    assert not second["undone"]


def test_losses_that_are_not_finite_stay_within_the_bounds() -> None:
    values = record([3.0, 3.0, math.inf, math.nan], [0.1] * 4).observe(1.0)
    assert np.isfinite(values).all()
    assert dict(zip(FEATURES, values, strict=True))["loss"] == 3.0


def test_what_was_undone_is_no_level_to_compare_with() -> None:
    found = record([3.0, 3.0, 9.0, 9.0], [0.1] * 4)
    found.take(UNDO)
    found.add(3.0, 0.1)
    after = dict(zip(FEATURES, found.observe(1.0), strict=True))
    assert (after["undone"], after["evidence"]) == (1, 0), "one alignment tells no error"
    assert after["moved"] == pytest.approx(-2 / 3)
    assert after["change of loss"] == pytest.approx(0, abs=1e-12)


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
    (action,) = AlignmentRule().act(seen(**values))
    assert action != UNDO
    assert CHANGES[action] == change


def test_the_rule_goes_back_where_the_loss_has_risen_beyond_its_noise() -> None:
    rule, risen = AlignmentRule(), {"alignment": -0.1, "loss": 0.8}
    assert rule.act(seen(**risen)) == [UNDO]
    assert rule.act(seen(**risen, noise=2.0)) != [UNDO]
    assert rule.act(seen(**risen | {"alignment": 0.1})) != [UNDO], "steps that go on do no damage"


def test_the_rule_goes_back_where_the_first_steps_surely_take_back() -> None:
    rule, early = AlignmentRule(), HIGH | {"time": 0.1}
    assert rule.act(seen(**early)) == [UNDO]
    for values in (
        early | {"time": 0.17},
        early | {"moved": -1 / 3},
        early | {"evidence": -0.3},
        early | {"alignment_over_the_first": -0.15},
        early | {"alignment_over_the_first": -0.3, "evidence": -0.5},
    ):
        assert rule.act(seen(**values)) != [UNDO]


def acts(losses: Any, alignments: Any, total: int = 200) -> list[int]:
    """What the rule does at each moment of a run that goes on unchanged."""
    found, moments, actions = RunRecord(total), decision_steps(total), list[int]()
    for step, (loss, aligned) in enumerate(zip(losses, alignments, strict=True), 1):
        found.add(loss, aligned)
        if step in moments:
            actions += AlignmentRule().act(found.judged(min(1.0, 10 * step / total))[None])
            found.take(KEEP)
    return actions


def test_a_run_on_labels_whose_alignments_are_noise_is_left_alone() -> None:
    """MiniLM on film reviews: at step 15 the mean alignment is -0.023, and the loss 0.99 of the first."""
    losses = [691, 708, 700, 672, 706, 715, 688, 681, 690, 697, 700, 709, 664, 703, 677]
    aligned = [math.nan, -91, 38, -25, -3, 27, -95, 2, 14, -7, -25, -75, -23, 12, -3]
    assert acts(np.array(losses) / 1000, np.array(aligned) / 1000, 120) == [KEEP] * 3


@pytest.mark.parametrize("total", [60, 120, 400])
@pytest.mark.parametrize("size", [0.01, 0.03, 0.1, 0.3])
def test_noise_moves_nothing(total: int, size: float) -> None:
    moved = 0
    for seed in range(40):
        drawn = np.random.default_rng(seed).standard_normal((2, decision_steps(total)[-1]))
        moved += any(acts(math.log(2) * np.exp(0.03 * drawn[0]), size * drawn[1], total))
    assert moved <= 1, "errors of nine steps are guesses themselves"


@pytest.mark.parametrize(("falls", "first"), [(0.0, KEEP), (0.4, UNDO)])
def test_steps_that_surely_take_back_are_undone_where_the_loss_has_moved(falls: float, first: int) -> None:
    steps = np.arange(22)
    aligned = np.where(steps < 5, 0.2, -0.07) + 0.04 * np.random.default_rng(0).standard_normal(22)
    losses = 4 * np.exp(0.06 * (-1.0) ** steps - falls * (steps > 4))
    actions = acts(losses, aligned)
    assert next(filter(None, actions), KEEP) == first


def test_a_loss_that_surely_rises_is_undone() -> None:
    draws = np.random.default_rng(0).standard_normal((2, 50))
    losses = 0.7 * np.exp(0.03 * draws[0] + 0.05 * np.arange(50).clip(min=10) - 0.5)
    assert UNDO in acts(losses, 0.05 * draws[1] - 0.05)
