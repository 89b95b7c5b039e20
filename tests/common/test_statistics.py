"""Paired statistics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from rankpilot.common.statistics import Estimate, estimate

from benchmarks.harness import medians


def alone(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, size=400)
    result = estimate(values, alone(400))
    half = 1.96 * values.std() / 20
    assert result.value == pytest.approx(values.mean())
    assert (result.low, result.high) == pytest.approx((result.value - half, result.value + half), abs=0.03)
    assert estimate(values, alone(400)) == result, "the same draws each time"


def test_repetitions_of_a_task_are_no_new_tasks() -> None:
    """Twenty tasks, each repeated five times with the same result: as wide as twenty tasks, not as a hundred."""
    values = np.random.default_rng(1).normal(size=20)
    groups = np.repeat(alone(20), 5).tolist()
    once, often = estimate(values, alone(20)), estimate(np.repeat(values, 5), groups)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    pretended = estimate(np.repeat(values, 5), alone(100))
    assert pretended.high - pretended.low < 0.6 * (often.high - often.low)


def test_tasks_of_different_size_count_by_their_runs() -> None:
    result = estimate([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert (result.value, result.low, result.high) == (2.0, 1.0, 5.0)
    assert f"{Estimate(1.0416, 0.98, 1.1):+.2f}" == "+1.04 (+0.98 to +1.10)"
    assert f"{Estimate(1.0, 1.0, 1.0):.1f}" == "1.0", "one task tells no interval"


def test_intervals_hold_the_truth_as_often_as_they_say_where_tasks_are_few() -> None:
    """Plain quantiles of the draws hold it in 85 % of the cases."""
    generator, held = np.random.default_rng(2), 0
    for _ in range(400):
        values = generator.normal(0.3, 1.0, size=(6, 1)) + 0.1 * generator.normal(size=(6, 5))
        result = estimate(values.ravel(), np.repeat(alone(6), 5).tolist())
        held += result.low <= 0.3 <= result.high
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    pair = estimate([1.0, 2.0], alone(2))
    assert (pair.low, pair.high) == (1.0, 2.0), "as far as they are apart"


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_medians_by_hand(size: int) -> None:
    """Of one value a run, and of several at a time."""
    generator = np.random.default_rng(size)
    table, counts = generator.normal(size=(size, 3)), generator.multinomial(size, np.full(size, 1 / size), size=9)
    drawn = [np.repeat(table, count, axis=0) for count in counts]
    np.testing.assert_allclose(medians(table, counts), [np.median(draw, axis=0) for draw in drawn])
    np.testing.assert_allclose(medians(table[:, 0], counts), [np.median(draw[:, 0]) for draw in drawn])
