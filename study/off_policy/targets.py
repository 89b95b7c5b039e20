"""Target policies: what a policy that is to be evaluated would have chosen at logged decisions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...common.arrays import FloatArray
from .logged import LoggedChoices


@dataclass(frozen=True, eq=False)
class TargetPolicy:
    """A policy at the decisions of a log.

    Attributes:
        name: for tables.
        probabilities: with which it takes each plan, float64 (sum of plans,), laid out as in `LoggedChoices`.
        scores: by which it ranks the plans of a task, of the same shape; higher is better. None to rank by probability.
    """

    name: str
    probabilities: FloatArray
    scores: FloatArray | None = None

    @classmethod
    def greedy(cls, name: str, choices: LoggedChoices, scores: FloatArray) -> TargetPolicy:
        """The policy that takes the plan of the highest score at each decision; the first of several.

        Args:
            name: of the policy.
            choices: the decisions.
            scores: of each plan, (sum of plans,).

        Raises:
            DataError: scores of another shape.
        """
        choices.check_flat("scores", scores)
        order = np.lexsort((-np.arange(len(scores)), scores, choices.decision_of))
        best = order[choices.starts + choices.plans - 1]
        probabilities = np.zeros(len(scores))
        probabilities[best] = 1
        return cls(name, probabilities, scores)

    @property
    def ranking(self) -> FloatArray:
        """What it ranks plans by, (sum of plans,)."""
        return self.probabilities if self.scores is None else self.scores

    def check(self, choices: LoggedChoices) -> None:
        """Check that it is a policy at these decisions.

        Raises:
            DataError: values of another shape, or probabilities that do not sum to 1.
        """
        name = f"The target {self.name!r}"
        choices.check_flat(f"{name}: probabilities", self.probabilities)
        choices.check_distributions(f"{name}: probabilities", self.probabilities)
        if self.scores is not None:
            choices.check_flat(f"{name}: scores", self.scores)
