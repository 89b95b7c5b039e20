"""Estimates from predictions and importance weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...common.arrays import FloatArray
from ...common.statistics import ratio_estimate
from ...errors import DataError
from .estimates import Method, PolicyEstimate, unweighted
from .logged import LoggedChoices
from .overlap import overlap
from .targets import TargetPolicy


def direct(choices: LoggedChoices, target: TargetPolicy) -> PolicyEstimate:
    """The direct method: what a model expects of the plans that the target would take.

    V = mean over decisions i of sum over plans p of pi(p | i) q(i, p), with q the predictions (Dudik et al., 2011,
    "Doubly robust policy evaluation and learning", ICML, arXiv 1103.4601, equation 1). It needs no probabilities. Its
    interval knows of the draw of tasks alone, not of the model's error, so it holds the truth less often than it says.

    Args:
        choices: decisions with predictions by a model that has not seen their tasks.
        target: the policy to be evaluated.

    Raises:
        DataError: there are no predictions, or the target does not fit the decisions.
    """
    target.check(choices)
    return unweighted("direct", choices, _expected(choices, target, _predictions(choices)))


def importance(choices: LoggedChoices, target: TargetPolicy) -> PolicyEstimate:
    """Importance sampling: outcomes weighted by how much more often the target takes the plan.

    V = mean over decisions i of w(i) r(i), w(i) = pi(p(i) | i) / b(p(i) | i) (Horvitz and Thompson, 1952, "A
    generalization of sampling without replacement from a finite universe"). Unbiased, but it moves with the origin of
    the outcomes: weights that sum to more or less than the number of decisions scale them all.

    Args:
        choices: decisions with probabilities.
        target: the policy to be evaluated.

    Raises:
        DataError: the target does not fit the decisions.
    """
    return _weighted("importance", choices, target, lambda weights: weights * choices.outcomes)


def self_normalised(choices: LoggedChoices, target: TargetPolicy) -> PolicyEstimate:
    """Self-normalised importance sampling: the mean outcome, weighted.

    V = sum of w(i) r(i) / sum of w(i), with w as of `importance` (Swaminathan and Joachims, 2015, "The self-normalized
    estimator for counterfactual learning", NeurIPS, equation 8). Slightly biased with few decisions; outcomes may have
    any origin.

    Args:
        choices: decisions with probabilities.
        target: the policy to be evaluated.

    Raises:
        DataError: the target does not fit the decisions.
    """
    return _weighted("self-normalised", choices, target, lambda weights: weights * choices.outcomes, normalised=True)


def doubly_robust(choices: LoggedChoices, target: TargetPolicy) -> PolicyEstimate:
    """The doubly robust estimate: the direct method, corrected by the weighted errors of its predictions.

    V = mean over decisions i of sum over plans p of pi(p | i) q(i, p) + w(i) (r(i) - q(i, p(i))), with q as of `direct`
    and w as of `importance` (Dudik et al., 2011, arXiv 1103.4601, equation 3). Unbiased as long as probabilities are
    right and the predictions come from other tasks; good predictions make it precise.

    Args:
        choices: decisions with probabilities, and predictions by a model that has not seen their tasks.
        target: the policy to be evaluated.

    Raises:
        DataError: there are no predictions, or the target does not fit the decisions.
    """
    target.check(choices)
    predictions = _predictions(choices)
    expected, errors = _expected(choices, target, predictions), choices.outcomes - choices.of_chosen(predictions)
    return _weighted("doubly robust", choices, target, lambda weights: expected + weights * errors)


def _expected(choices: LoggedChoices, target: TargetPolicy, predictions: FloatArray) -> FloatArray:
    """What the predictions say of the target at each decision, (decisions,)."""
    return choices.sums(target.probabilities * predictions)


def _predictions(choices: LoggedChoices) -> FloatArray:
    if choices.predictions is None:
        raise DataError("These choices have no predictions. Make them with `cross_fit`.")
    return choices.predictions


def _weighted(
    method: Method,
    choices: LoggedChoices,
    target: TargetPolicy,
    values: Callable[[FloatArray], FloatArray],
    *,
    normalised: bool = False,
) -> PolicyEstimate:
    """The mean of what `values` makes of the weights, or its sum over theirs if `normalised`; or the refusal."""
    seen = overlap(choices, target)
    gain = None
    if not seen.refused:
        below = seen.weights if normalised else np.ones(len(seen.weights))
        gain = ratio_estimate(values(seen.weights), below, choices.tasks)
    return PolicyEstimate(method, gain, seen.refused, seen.effective_size, seen.largest_weight)
