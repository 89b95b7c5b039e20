"""Overlap: whether the logged policy tried often enough what a target would do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...common.arrays import FloatArray
from .estimates import LARGEST_WEIGHT, LEAST_EFFECTIVE_SIZE, effective_size
from .logged import LoggedChoices
from .targets import TargetPolicy


@dataclass(frozen=True, eq=False)
class Overlap:
    """Importance weights of a target, and how far they can be trusted.

    A weight is the probability of the plan that was taken, under the target over under the logged policy.

    Attributes:
        weights: of each decision, (decisions,); empty if probabilities are unknown.
        effective_size: of the weights, in tasks; None if unknown.
        largest_weight: over all plans that the target would take, whether they were taken or not: infinite if the
            logged policy never takes one of them. None if unknown.
        refused: why there can be no estimate; None if there can be.
    """

    weights: FloatArray
    effective_size: float | None
    largest_weight: float | None
    refused: str | None


def overlap(choices: LoggedChoices, target: TargetPolicy) -> Overlap:
    """Compare a target with the policy that decided.

    The largest weight is not that of the plans which happened to be taken: a target whose plans are never drawn has
    weights of 0 and no large one. Because all probabilities are logged, it is known whatever was drawn.

    Args:
        choices: the decisions.
        target: the policy to be evaluated.

    Raises:
        DataError: the target does not fit the decisions.
    """
    target.check(choices)
    unknown = choices.unknown
    if choices.probabilities is None or unknown.any():
        reason = f"the probabilities of {np.count_nonzero(unknown)} of {len(unknown)} decisions are not known"
        return Overlap(np.zeros(0), None, None, f"{_refusal('unknown', 'unknown')}; {reason}.")
    wanted, possible = target.probabilities > 0, choices.probabilities > 0
    weights = np.where(wanted, np.inf, 0.0)
    np.divide(target.probabilities, choices.probabilities, out=weights, where=possible)
    of_chosen = choices.of_chosen(weights)
    size, largest = effective_size(choices, of_chosen), float(weights.max())
    enough = size >= LEAST_EFFECTIVE_SIZE and largest <= LARGEST_WEIGHT
    return Overlap(of_chosen, size, largest, None if enough else f"{_refusal(f'{size:.1f}', f'{largest:.1f}')}.")


def _refusal(size: str, largest: str) -> str:
    return (
        f"Not enough overlap: effective sample size {size} (at least {LEAST_EFFECTIVE_SIZE:g}), largest weight "
        f"{largest} (at most {LARGEST_WEIGHT:g})"
    )
