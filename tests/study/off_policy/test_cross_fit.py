"""Cross-fitting: every decision is predicted once, by a model that has not seen its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.errors import ConfigError, DataError
from rankpilot.study.off_policy.cross_fit import Predict, cross_fit
from rankpilot.study.off_policy.logged import LoggedChoices

TASKS = 11
GENERATOR = np.random.default_rng(0)
PLANS = GENERATOR.integers(1, 5, size=3 * TASKS)
LOG = LoggedChoices(
    [f"task {number % TASKS}" for number in range(3 * TASKS)],
    PLANS,
    PLANS - 1,
    GENERATOR.normal(size=3 * TASKS),
)


@pytest.mark.parametrize("folds", [2, 5, TASKS])
def test_no_model_has_seen_the_task(folds: int) -> None:
    predicted: list[int] = []

    def fit(learned: IntArray) -> Predict:
        def predict(held_out: IntArray) -> FloatArray:
            tasks = [{LOG.tasks[number] for number in part.tolist()} for part in (learned, held_out)]
            assert not tasks[0] & tasks[1]
            assert len(tasks[0] | tasks[1]) == TASKS, "all other tasks are learned from"
            predicted.extend(held_out.tolist())
            return np.repeat(held_out, LOG.plans[held_out]).astype(np.float64)

        return predict

    choices = cross_fit(LOG, fit, folds=folds)
    assert sorted(predicted) == list(range(3 * TASKS)), "each decision is predicted once"
    assert choices.predictions is not None
    assert choices.predictions.tolist() == LOG.decision_of.tolist(), "and each prediction lies at its plan"


def test_the_seed_decides_the_folds() -> None:
    def mean(learned: IntArray) -> Predict:
        return lambda held_out: np.full(LOG.plans[held_out].sum(), LOG.outcomes[learned].mean())

    first, again, other = (cross_fit(LOG, mean, seed=seed).predictions for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert (first == again).all()
    assert (first != other).any()


def test_a_model_that_knows_too_much_is_kept_from_it() -> None:
    """One that remembers the mean outcome of each task predicts nothing of noise."""

    def remember(learned: IntArray) -> Predict:
        known = {LOG.tasks[number]: LOG.outcomes[number] for number in learned.tolist()}
        return lambda held_out: np.concatenate(
            [np.full(LOG.plans[each], known.get(LOG.tasks[each], 0.0)) for each in held_out.tolist()]
        )

    predictions = cross_fit(LOG, remember).predictions
    assert predictions is not None
    assert not predictions.any()


@pytest.mark.parametrize("folds", [1, 0, TASKS + 1])
def test_folds_out_of_range(folds: int) -> None:
    with pytest.raises(ConfigError, match=rf"from 2 to the number of tasks, {TASKS}; got {folds}"):
        cross_fit(LOG, lambda learned: lambda held_out: np.zeros(0), folds=folds)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda count: np.zeros(count + 1), "Predictions have one value for each plan"),
        (lambda count: np.full(count, np.nan), "Predictions are finite"),
    ],
)
def test_bad_predictions(values: Callable[[int], FloatArray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cross_fit(LOG, lambda learned: lambda held_out: values(int(LOG.plans[held_out].sum())))


def test_earlier_predictions_are_replaced() -> None:
    old = replace(LOG, predictions=np.full(LOG.plans.sum(), 9.0))
    new = cross_fit(old, lambda learned: lambda held_out: np.zeros(LOG.plans[held_out].sum()))
    assert new.predictions is not None
    assert not new.predictions.any()
