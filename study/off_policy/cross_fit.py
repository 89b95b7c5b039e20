"""Predictions of outcomes by models that have not seen the task: cross-fitting.

A model that has learned from a task's own outcome predicts its noise, and the doubly robust estimate is biased
(Chernozhukov et al., 2018, "Double/debiased machine learning", arXiv 1608.00060).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...common.arrays import FloatArray, IntArray
from ...errors import ConfigError, DataError
from .logged import LoggedChoices

FOLDS = 5

Predict = Callable[[IntArray], FloatArray]
"""Takes numbers of decisions; gives the outcome expected of each of their plans, one decision after another."""

Fit = Callable[[IntArray], Predict]
"""Takes numbers of decisions, learns from their outcomes alone, and gives what predicts those of others."""


def cross_fit(choices: LoggedChoices, fit: Fit, *, folds: int = FOLDS, seed: int = 0) -> LoggedChoices:
    """The same choices with predictions, each by a model fitted to other tasks.

    Args:
        choices: the decisions.
        fit: called once a fold.
        folds: groups of whole tasks, from 2 to the number of tasks; each is predicted from the others.
        seed: decides which tasks are in which fold.

    Raises:
        ConfigError: folds out of range.
        DataError: predictions of the wrong number, or not finite.
    """
    number = choices.task_numbers
    tasks = int(number.max()) + 1
    if not 2 <= folds <= tasks:
        raise ConfigError(f"folds of a cross-fit are from 2 to the number of tasks, {tasks}; got {folds}.")
    fold = (np.random.default_rng(seed).permutation(tasks) % folds)[number]
    predictions = np.zeros(int(choices.plans.sum()))
    for held_out in range(folds):
        decisions = np.flatnonzero(fold == held_out)
        places = choices.plans_of(decisions)
        predicted = fit(np.flatnonzero(fold != held_out))(decisions)
        if np.shape(predicted) != places.shape:
            raise DataError(
                f"Predictions have one value for each plan of the decisions, {places.shape}; got {np.shape(predicted)}."
            )
        predictions[places] = predicted
    return replace(choices, predictions=predictions)
