"""Figures of a suite on numbers whose results can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.common.statistics import Estimate, rank_correlation
from rankpilot.study.policy.suite_figures import (
    correlations,
    decides_nothing,
    promise_of,
    worst_against_rest,
    worst_count,
)


@pytest.mark.parametrize(("runs", "worst"), [(2, 1), (14, 1), (16, 2), (96, 10)])
def test_the_worst_are_a_tenth_and_one_at_least(runs: int, worst: int) -> None:
    assert worst_count(runs) == worst


@pytest.mark.parametrize(("low", "high", "nothing"), [(-0.1, 0.2, True), (0.1, 0.2, False), (-0.2, -0.1, False)])
def test_what_decides_nothing(low: float, high: float, nothing: bool) -> None:
    assert decides_nothing(Estimate((low + high) / 2, low, high)) == nothing


def test_worst_runs_are_chosen_anew_in_each_draw() -> None:
    improvements, trait = np.arange(20.0)[::-1], np.arange(20.0) ** 2
    values = np.stack([improvements, trait], axis=1)
    generator = np.random.default_rng(0)
    draws = [np.arange(20), generator.integers(20, size=20), np.array([3, 5])]
    counts = np.stack([np.bincount(draw, minlength=20) for draw in draws])
    found = worst_against_rest(values, counts)
    for draw, gap in zip(draws, found, strict=True):
        ordered = trait[sorted(draw.tolist(), key=lambda run: improvements[run])]
        cut = worst_count(len(draw))
        assert gap == pytest.approx(ordered[:cut].mean() - ordered[cut:].mean())
    assert found[0] == (19**2 + 18**2) / 2 - trait[:18].mean()


def test_correlations_are_those_of_each_draw() -> None:
    values = np.random.default_rng(1).normal(size=(8, 2))
    draw = np.array([0, 0, 2, 3, 5, 7])
    counts = np.stack([np.ones(8, dtype=np.int64), np.bincount(draw, minlength=8), np.eye(8, dtype=np.int64)[0]])
    whole, drawn, constant = correlations(values, counts)
    assert whole == pytest.approx(np.corrcoef(values.T)[0, 1])
    assert drawn == pytest.approx(np.corrcoef(values[draw].T)[0, 1])
    assert constant == 0


def test_a_promise_that_is_kept_and_one_that_is_not() -> None:
    expected, spread = np.arange(1.0, 10.0), np.full(9, 2.0)
    tasks = [f"task {number // 2}" for number in range(9)]
    kept = promise_of(expected, spread, expected - 0.5, tasks)
    assert kept
    assert kept.correlation.value == pytest.approx(1)
    assert (kept.gained.value, kept.gained.low) == (1, 1)
    assert [third.runs for third in kept.thirds] == [3, 3, 3]
    assert [third.surety for third in kept.thirds] == [1, 2.5, 4]
    # Chances below half, one and one and a half standard deviations of a normal distribution.
    assert kept.thirds[0].claimed == pytest.approx((0.6915 + 0.8413 + 0.9332) / 3, abs=1e-4)
    real = np.where(np.arange(9) < 6, 1.0, -1.0) * np.arange(1, 10)
    broken = promise_of(expected, spread, real, tasks)
    assert broken
    assert broken.correlation.value == pytest.approx(rank_correlation(expected, real))
    assert [third.gained.value for third in broken.thirds] == [1, 1, 0]
    assert broken.claimed == kept.claimed
    assert broken.gained.value == pytest.approx(2 / 3)


def test_few_runs_promise_nothing() -> None:
    few = np.ones(5)
    assert promise_of(few, few, few, list("abcde")) is None
    many = np.ones(6)
    assert promise_of(many, many, many, ["one task"] * 6) is None
