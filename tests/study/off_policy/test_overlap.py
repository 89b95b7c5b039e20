"""Weights, effective sample sizes, and refusals: without overlap there is never a figure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rankpilot.study.off_policy.estimates import PolicyEstimate, effective_size
from rankpilot.study.off_policy.logged import LoggedChoices
from rankpilot.study.off_policy.overlap import overlap
from rankpilot.study.off_policy.targets import TargetPolicy
from rankpilot.study.off_policy.weighted import doubly_robust, importance, self_normalised

from .small_logs import PAIRS, pairs, target, unknown

WEIGHTED = (importance, self_normalised, doubly_robust)
Estimator = Callable[[LoggedChoices, TargetPolicy], PolicyEstimate]


def test_weights_by_hand() -> None:
    seen = overlap(pairs(), target())
    np.testing.assert_allclose(seen.weights, np.tile([0.5, 2.0], PAIRS))
    assert seen.effective_size == pytest.approx((2.5 * PAIRS) ** 2 / (4.25 * PAIRS))
    assert seen.largest_weight == pytest.approx(3.0), "of a plan that was never taken: .6 / .2"
    assert seen.refused is None


def test_the_policy_that_decided_has_weights_of_1() -> None:
    choices = pairs()
    assert choices.probabilities is not None
    seen = overlap(choices, TargetPolicy("same", choices.probabilities))
    np.testing.assert_allclose(seen.weights, 1)
    assert seen.effective_size == pytest.approx(2 * PAIRS)


def test_the_effective_size_counts_tasks() -> None:
    choices = pairs()
    weights = np.ones(2 * PAIRS)
    assert effective_size(choices, weights) == 2 * PAIRS
    assert effective_size(replace(choices, tasks=np.repeat(range(PAIRS), 2).tolist()), weights) == PAIRS
    assert effective_size(choices, np.zeros(2 * PAIRS)) == 0
    weights[0] = 1e9
    assert effective_size(choices, weights) == pytest.approx(1)


def one_hot(plans: list[int]) -> TargetPolicy:
    """Takes these plans at the two kinds of decisions."""
    parts = [np.eye(count)[plan] for count, plan in zip((2, 3), plans, strict=True)]
    return TargetPolicy("one-hot", np.tile(np.concatenate(parts), PAIRS))


def deterministic() -> LoggedChoices:
    """The policy that decided always takes the plan that it took."""
    return replace(pairs(), probabilities=np.tile([1.0, 0.0, 0.0, 1.0, 0.0], PAIRS))


def rare(probability: float) -> LoggedChoices:
    """The second plan of each pair of plans is rare, and was taken once."""
    choices = pairs(20)
    chosen = choices.chosen.copy()
    chosen[0] = 1
    return replace(choices, chosen=chosen, probabilities=np.tile([1 - probability, probability, 0.4, 0.5, 0.1], 20))


CASES: dict[str, tuple[LoggedChoices, TargetPolicy, str]] = {
    "unknown probabilities": (unknown(pairs()), target(), "probabilities of 16 of 16 decisions are not known"),
    "one unknown": (
        replace(pairs(), probabilities=np.concatenate([[np.nan, np.nan], np.tile([0.4, 0.5, 0.1, 0.8, 0.2], 8)[:38]])),
        target(),
        "probabilities of 1 of 16 decisions are not known",
    ),
    "deterministic, other plans": (deterministic(), one_hot([1, 0]), "size 0.0 .*, largest weight inf"),
    "deterministic, the same plans half of the time": (deterministic(), one_hot([0, 0]), "largest weight inf"),
    "deterministic, a part of the target": (deterministic(), target(), "largest weight inf"),
    "plans that were never drawn": (pairs(), one_hot([1, 0]), r"size 0.0 \(at least 10\), largest weight 5.0"),
    "one giant weight": (rare(0.04), TargetPolicy("t", np.tile([0.0, 1, 0, 1, 0], 20)), r"weight 25.0 \(at most 20\)"),
    "a giant weight that was not drawn": (
        replace(rare(0.04), chosen=pairs(20).chosen),
        TargetPolicy("t", np.tile([0.0, 1, 0, 1, 0], 20)),
        "size 20.0 .*, largest weight 25.0",
    ),
    "few tasks": (pairs(4), target(4), r"size 5.9 \(at least 10\), largest weight 3.0"),
    "many decisions of few tasks": (replace(pairs(), tasks=[0, 1] * PAIRS), target(), r"size 1.5 \(at least 10\)"),
}


@pytest.mark.parametrize("estimator", WEIGHTED)
@pytest.mark.parametrize("name", CASES)
def test_without_overlap_there_is_no_figure(name: str, estimator: Estimator) -> None:
    choices, policy, message = CASES[name]
    estimate = estimator(choices, policy)
    assert estimate.gain is None
    assert estimate.refused is not None
    assert estimate.refused.startswith("Not enough overlap: effective sample size ")
    assert re.search(message, estimate.refused)
    assert f"{estimate:.3f}" == estimate.refused


def test_at_the_limits_there_is_a_figure() -> None:
    heavy = overlap(replace(rare(0.05), chosen=pairs(20).chosen), TargetPolicy("t", np.tile([0.0, 1, 0, 1, 0], 20)))
    assert (heavy.largest_weight, heavy.refused) == (20, None)
    few, half = pairs(10), TargetPolicy("t", np.tile([0.0, 1, 0, 1, 0], 10))
    assert overlap(few, half).effective_size == 10, "every second plan that was taken is the target's"
    estimate = self_normalised(few, half)
    assert estimate.refused is None
    assert estimate.gain is not None


def test_a_figure_and_a_refusal_exclude_each_other() -> None:
    figure = self_normalised(pairs(), target())
    for gain, refused in ((figure.gain, "why"), (None, None)):
        with pytest.raises(AssertionError, match="a figure or a refusal"):
            replace(figure, gain=gain, refused=refused)
