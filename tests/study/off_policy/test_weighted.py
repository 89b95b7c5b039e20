"""The direct method, importance sampling and the doubly robust estimate, by hand; see `small_logs.pairs`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.common.statistics import ratio_estimate
from rankpilot.errors import DataError
from rankpilot.study.off_policy.estimates import PolicyEstimate
from rankpilot.study.off_policy.targets import TargetPolicy
from rankpilot.study.off_policy.weighted import direct, doubly_robust, importance, self_normalised

from .small_logs import PAIRS, pairs, target, unknown


def value(estimate: PolicyEstimate) -> float:
    assert estimate.gain is not None, estimate.refused
    assert estimate.gain.low <= estimate.gain.value <= estimate.gain.high
    return estimate.gain.value


def test_importance_by_hand() -> None:
    assert value(importance(pairs(), target())) == pytest.approx((0.5 * 1 + 2 * 3) / 2)


def test_self_normalised_by_hand() -> None:
    assert value(self_normalised(pairs(), target())) == pytest.approx((0.5 * 1 + 2 * 3) / (0.5 + 2))


def test_direct_by_hand() -> None:
    assert value(direct(pairs(), target())) == pytest.approx(((0.4 * 0.5 + 0.6 * 2) + 2) / 2)


def test_doubly_robust_by_hand() -> None:
    first, second = 1.4 + 0.5 * (1 - 0.5), 2 + 2 * (3 - 2)
    estimate = doubly_robust(pairs(), target())
    assert value(estimate) == pytest.approx((first + second) / 2)
    assert estimate.gain == ratio_estimate(np.tile([first, second], PAIRS), np.ones(2 * PAIRS), range(2 * PAIRS))


def test_what_is_told_beside_the_figure() -> None:
    for estimator, name in ((importance, "importance"), (doubly_robust, "doubly robust")):
        estimate = estimator(pairs(), target())
        assert estimate.method == name
        assert estimate.effective_size == pytest.approx(2.5**2 / 4.25 * PAIRS)
        assert estimate.largest_weight == pytest.approx(3)
    of_model = direct(pairs(), target())
    assert of_model.effective_size == 2 * PAIRS
    assert of_model.largest_weight is None
    assert f"{of_model:.2f}".startswith("1.70 (")


def test_the_direct_method_needs_no_probabilities_but_tasks() -> None:
    assert direct(unknown(pairs()), target()).gain == direct(pairs(), target()).gain
    few = direct(pairs(4), target(4))
    assert few.gain is None
    assert few.refused == "Not enough tasks: effective sample size 8.0 (at least 10)."


def test_outcomes_from_another_origin() -> None:
    """Self-normalised and doubly robust estimates move along; importance sampling does not."""
    choices = pairs()
    assert choices.predictions is not None
    moved = replace(choices, outcomes=choices.outcomes + 100, predictions=choices.predictions + 100)
    for estimator in (self_normalised, doubly_robust, direct):
        assert value(estimator(moved, target())) == pytest.approx(100 + value(estimator(choices, target())))
    assert value(importance(moved, target())) == pytest.approx(125 + value(importance(choices, target())))


def test_right_predictions_leave_nothing_to_correct() -> None:
    choices = replace(pairs(), predictions=np.tile([1.0, 7.0, 0.0, 3.0, 9.0], PAIRS))
    assert doubly_robust(choices, target()).gain == direct(choices, target()).gain


def test_right_probabilities_correct_wrong_predictions() -> None:
    """Predictions that are off by as much for every plan change nothing but the width: weights are 1 on the mean."""
    choices = pairs()
    assert choices.probabilities is not None
    same = TargetPolicy("same", choices.probabilities)
    for predictions in (np.zeros(40), np.full(40, 50.0)):
        assert value(doubly_robust(replace(choices, predictions=predictions), same)) == pytest.approx(2)


@pytest.mark.parametrize("estimator", [direct, doubly_robust])
def test_without_predictions(estimator: object) -> None:
    assert callable(estimator)
    with pytest.raises(DataError, match=r"no predictions\. Make them with `cross_fit`"):
        estimator(replace(pairs(), predictions=None), target())


@pytest.mark.parametrize("estimator", [direct, importance, self_normalised, doubly_robust])
def test_a_target_of_another_log(estimator: object) -> None:
    assert callable(estimator)
    with pytest.raises(DataError, match="'target': probabilities has one value for each plan"):
        estimator(pairs(), target(4))
