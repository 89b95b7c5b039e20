"""Estimates of what a policy would have gained, and when there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...common.arrays import FloatArray
from ...common.statistics import Estimate, ratio_estimate
from .logged import LoggedChoices

Method = Literal["restricted choice", "direct", "importance", "self-normalised", "doubly robust"]

LEAST_EFFECTIVE_SIZE = 10.0
"""The least effective sample size, in tasks, of which there is an estimate."""

LARGEST_WEIGHT = 20.0
"""The largest importance weight with which there is an estimate."""


@dataclass(frozen=True)
class PolicyEstimate:
    """What a policy would have gained, or why that is not known: never both.

    Attributes:
        method: how it was estimated.
        gain: mean outcome with its 95 % interval; None if the estimate is refused.
        refused: why there is no figure; None if there is one.
        effective_size: number of equally weighted tasks that would tell as much (`effective_size`); None if unknown.
        largest_weight: the largest importance weight that the target could get; None if unknown, or without weights.
    """

    method: Method
    gain: Estimate | None
    refused: str | None
    effective_size: float | None
    largest_weight: float | None = None

    def __post_init__(self) -> None:
        assert (self.gain is None) != (self.refused is None), "a figure or a refusal"

    def __format__(self, form: str) -> str:
        """The figure with its interval, such as "0.31 (0.12 to 0.50)" for ".2f", or why there is none."""
        return str(self.refused) if self.gain is None else format(self.gain, form)


def effective_size(choices: LoggedChoices, weights: FloatArray) -> float:
    """How many equally weighted tasks would tell as much: (sum of w)^2 / sum of w^2, w a task's whole weight.

    Kish, 1965, "Survey Sampling", section 11.7. Decisions of one task are alike, so tasks are counted: never more than
    the same figure of single decisions.

    Args:
        choices: the decisions.
        weights: of each, at least 0, (decisions,).
    """
    whole = np.bincount(choices.task_numbers, weights)
    squares = float(whole @ whole)
    return float(whole.sum() ** 2 / squares) if squares else 0.0


def unweighted(
    method: Method, choices: LoggedChoices, values: FloatArray, weights: FloatArray | None = None
) -> PolicyEstimate:
    """The mean of values of decisions or, with weights of 0 and 1, of some of them; refused if there are few tasks.

    Args:
        method: how the values came about.
        choices: the decisions.
        values: of each, (decisions,).
        weights: of each, (decisions,); all 1 by default.
    """
    weights = np.ones(len(values)) if weights is None else weights
    size = effective_size(choices, weights)
    if size < LEAST_EFFECTIVE_SIZE:
        refused = f"Not enough tasks: effective sample size {size:.1f} (at least {LEAST_EFFECTIVE_SIZE:g})."
        return PolicyEstimate(method, None, refused, size)
    return PolicyEstimate(method, ratio_estimate(weights * values, weights, choices.tasks), None, size)
