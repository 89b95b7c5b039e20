"""Logged choices: which plans were possible at each decision, which was taken, and how the run ended.

A run has one decision here, so each is a contextual bandit: what was seen, the plans, the choice, the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...common.arrays import BoolArray, FloatArray, IntArray
from ...errors import DataError

_SUM_TOLERANCE = 1e-4
"""By how much the probabilities of a decision may miss 1: logs hold them with single precision."""


@dataclass(frozen=True, eq=False)
class LoggedChoices:
    """Decisions, each of a run of its own. Lists of plans are laid end to end: first the plans of decision 0.

    Two decisions, with three and two possible plans, of which the last and the first were taken:

        LoggedChoices(
            tasks=["a", "b"],
            plans=np.array([3, 2]),
            chosen=np.array([2, 0]),
            outcomes=np.array([-0.7, -1.2]),
            probabilities=np.array([0.1, 0.2, 0.7, 0.5, 0.5]),
        )

    Attributes:
        tasks: the task of each decision, (decisions,). Decisions of one task are alike: intervals draw whole tasks.
        plans: number of possible plans at each decision, int64 (decisions,), at least 1. They differ from each other: a
            plan that several candidates lead to is one plan, and has their probabilities together.
        chosen: the plan that was taken, counted from 0 among the decision's own, int64 (decisions,).
        outcomes: what came of it, float64 (decisions,), finite; higher is better. Usually the gain, minus the log of
            the held-out loss; all in one unit, which is that of every estimate.
        probabilities: with which each plan would have been taken, float64 (sum of plans,). They sum to 1 at each
            decision, or all of a decision are NaN: unknown. None if all are unknown, as under a policy without
            exploration.
        predictions: the outcome that a model expects of each plan, float64 (sum of plans,), or None. The model must not
            have learned from the decision's task: see `cross_fit`.

    Raises:
        DataError: arrays that do not fit together, or hold values that cannot be.
    """

    tasks: Sequence[str | int]
    plans: IntArray
    chosen: IntArray
    outcomes: FloatArray
    probabilities: FloatArray | None = None
    predictions: FloatArray | None = None

    def __post_init__(self) -> None:
        lengths = {name: np.shape(getattr(self, name)) for name in ("tasks", "plans", "chosen", "outcomes")}
        if set(lengths.values()) != {(len(self.tasks),)} or not len(self.tasks):
            raise DataError(
                f"tasks, plans, chosen and outcomes have one value for each decision, at least 1; got {lengths}."
            )
        if np.min(self.plans) < 1:
            raise DataError(f"Each decision has at least 1 possible plan; decision {np.argmin(self.plans)} has none.")
        wrong = np.flatnonzero((self.chosen < 0) | (self.chosen >= self.plans))
        if len(wrong):
            first = wrong[0]
            raise DataError(
                f"chosen counts from 0 among the plans of a decision; decision {first} has {self.plans[first]} plans "
                f"and chose {self.chosen[first]}."
            )
        wrong = np.flatnonzero(~np.isfinite(self.outcomes))
        if len(wrong):
            raise DataError(
                f"Outcomes are finite; that of decision {wrong[0]} is {self.outcomes[wrong[0]]}. Give a failed run the "
                "outcome of one that gained nothing."
            )
        for name in ("probabilities", "predictions"):
            if getattr(self, name) is not None:
                self.check_flat(name, getattr(self, name))
        if self.probabilities is not None:
            self._check_probabilities(self.probabilities)
        if self.predictions is not None and not np.isfinite(self.predictions).all():
            raise DataError(f"Predictions are finite; {np.count_nonzero(~np.isfinite(self.predictions))} are not.")

    def check_flat(self, name: str, values: FloatArray) -> None:
        """Check that there is one value for each plan of each decision.

        Args:
            name: of the values, for the error.
            values: of which the shape is checked.

        Raises:
            DataError: there are more or fewer.
        """
        if np.shape(values) != (self.plans.sum(),):
            raise DataError(
                f"{name} has one value for each plan of each decision, ({self.plans.sum()},); got {np.shape(values)}."
            )

    def _check_probabilities(self, probabilities: FloatArray) -> None:
        unknown = np.isnan(probabilities)
        mixed = np.flatnonzero(self.sums(unknown) % self.plans)
        if len(mixed):
            raise DataError(f"Some probabilities of decision {mixed[0]} are NaN: give all of them, or NaN for all.")
        self.check_distributions("probabilities", np.where(unknown, 1 / self.plans[self.decision_of], probabilities))
        impossible = np.flatnonzero(self.of_chosen(probabilities) == 0)
        if len(impossible):
            raise DataError(f"Decision {impossible[0]} took a plan whose probability is 0.")

    def check_distributions(self, name: str, probabilities: FloatArray) -> None:
        """Check that the numbers of each decision are probabilities that sum to 1.

        Raises:
            DataError: they are not.
        """
        sums: FloatArray = self.sums(probabilities)
        wrong = ~((probabilities >= 0) & (probabilities <= 1 + _SUM_TOLERANCE))
        bad = np.flatnonzero((self.sums(wrong) > 0) | ~(np.abs(sums - 1) <= _SUM_TOLERANCE))
        if len(bad):
            first = bad[0]
            values = probabilities[self.starts[first] : self.starts[first] + self.plans[first]]
            raise DataError(
                f"{name} of a decision are from 0 to 1 and sum to 1; those of decision {first} are from "
                f"{values.min():.3g} to {values.max():.3g} and sum to {sums[first]:.6g}."
            )

    @cached_property
    def starts(self) -> IntArray:
        """Where the plans of each decision begin, (decisions,)."""
        return np.asarray(np.cumsum(self.plans) - self.plans)

    @cached_property
    def decision_of(self) -> IntArray:
        """The decision of each plan, (sum of plans,)."""
        return np.repeat(np.arange(len(self.plans)), self.plans)

    @cached_property
    def task_numbers(self) -> IntArray:
        """The task of each decision as a number from 0 on, (decisions,)."""
        return np.asarray(np.unique(np.asarray(self.tasks), return_inverse=True)[1])

    @property
    def unknown(self) -> BoolArray:
        """Decisions whose probabilities are not known, (decisions,)."""
        if self.probabilities is None:
            return np.ones(len(self.plans), dtype=np.bool_)
        return np.isnan(self.of_chosen(self.probabilities))

    def of_chosen(self, values: FloatArray) -> FloatArray:
        """Of values of all plans, (sum of plans,), those of the plans that were taken, (decisions,)."""
        return np.asarray(values[self.starts + self.chosen])

    def sums(self, values: FloatArray | BoolArray) -> FloatArray:
        """The sum over each decision's plans of values of all plans, (decisions,)."""
        return np.asarray(np.add.reduceat(values.astype(np.float64), self.starts))

    def plans_of(self, decisions: IntArray) -> IntArray:
        """Places, in values of all plans, of the plans of some decisions, one decision after another."""
        return np.concatenate([self.starts[each] + np.arange(self.plans[each]) for each in decisions])
