"""Candidates: the actions from which a learned policy chooses at a decision.

Some are fixed: those of the rules and the actor's. Others are drawn. Their scores are weighted sums of the mean signal,
the cost of a rank, the relative depth and the actor's scores. Weights and placements are drawn from wide distributions,
because nobody knows in advance how deep adapters should go, or how far signals can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...allocation.actions import SCORE_BOUND, base_rank_floor
from ...allocation.deliberation import DRAWN
from ...allocation.observation import Observation, module_feature
from ...allocation.plan import uniform_ranks, uniform_window
from ...allocation.policy import Decision, decided_plan, decision_from_plan, decision_from_scores, decision_to_keep
from ...allocation.problem import AllocationProblem
from ...common.arrays import FloatArray, IntArray
from ...memory.cost import ParameterCost
from ..rules import signal_mean

BASIS = ("signal_mean", "rank_cost", "relative_depth", "actor")
"""The scores of candidates are weighted sums of these."""

_FIXED = {
    "uniform": (0, 0, 0, 0),
    "top-down": (0, 0, 0, 0),
    "signal-mean": (0.5, 0, 0, 0),
    "top-down-mlp": (0, 1, 0, 0),
    "actor": (0, 0, 0, 1),
}
"""Weights of the fixed candidates, by name."""

FIXED_NAMES = tuple(_FIXED)
"""Names of the fixed candidates; they come first."""

FIXED = len(_FIXED)
"""Number of fixed candidates."""

UNIFORM = FIXED_NAMES[0]
"""Name of the candidate with equal ranks."""

KEEP = "keep"
"""Name of the candidate that leaves the ranks as they are."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates at a decision, C of them.

    Attributes:
        names: (C,).
        weights: of each part of `BASIS` in the scores, (C, len(BASIS)).
        scores: (C, modules).
        placements: see `PLACEMENT`, (C, 2).
        plans: ranks, int64 (modules,), of the candidates that follow from no scores under this budget, by name.
    """

    names: tuple[str, ...]
    weights: NDArray[np.float64]
    scores: NDArray[np.float64]
    placements: NDArray[np.float64]
    plans: Mapping[str, IntArray] = field(default_factory=dict)

    @classmethod
    def joined(cls, *parts: Candidates) -> Candidates:
        """Some one after another."""
        return cls(
            tuple(name for part in parts for name in part.names),
            np.concatenate([part.weights for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.placements for part in parts]),
            {name: ranks for part in parts for name, ranks in part.plans.items()},
        )

    def rows(self, part: slice) -> Candidates:
        """Some of them."""
        return Candidates(self.names[part], self.weights[part], self.scores[part], self.placements[part], self.plans)

    def after_keep(self) -> Candidates:
        """The same after one more, which keeps the ranks in place."""
        first = self.rows(slice(0, 1))
        nothing = (np.zeros_like(part) for part in (first.weights, first.scores, first.placements))
        weights, scores, placements = nothing
        return Candidates.joined(Candidates((KEEP,), weights, scores, placements), self)

    def with_uniform_plan(self, problem: AllocationProblem) -> Candidates:
        """The same, with the very plan of the rule for the candidate `UNIFORM`, whose scores come near to it alone."""
        ranks = decided_plan(problem, decision_from_plan(uniform_ranks(problem))).ranks
        return replace(self, plans={**self.plans, UNIFORM: ranks})

    def decisions(self, observation: Observation) -> list[Decision]:
        """The decision that each leads to."""
        return [
            self._decision(observation, name, *values)
            for name, *values in zip(self.names, self.scores, self.placements, strict=True)
        ]

    def _decision(self, observation: Observation, name: str, scores: FloatArray, placement: FloatArray) -> Decision:
        if name == KEEP:
            return decision_to_keep(observation)
        if name in self.plans:
            return Decision(self.plans[name], scores, exact=True)
        return decision_from_scores(observation, scores, placement)


def candidate_actions(
    observation: Observation, scores: FloatArray, placement: FloatArray, draws: int, generator: np.random.Generator
) -> Candidates:
    """The candidates at a decision.

    Args:
        observation: of the decision.
        scores: the actor's, (modules,).
        placement: the actor's, (2,).
        draws: number of candidates that are drawn, beside the fixed ones.
        generator: draws them.
    """
    problem = observation.problem
    by_parameters = isinstance(problem.cost, ParameterCost)
    parts = (signal_mean(observation), *(module_feature(observation, name) for name in BASIS[1:3]), scores)
    basis = np.stack([part - part.mean() for part in parts])
    rank, _ = uniform_window(problem.fresh()) or (1, 0)
    uniform = (np.log2(rank / base_rank_floor(problem)), 0)
    fixed = np.array([uniform, (0, 0), (0, 0), (0, 0), tuple(placement)], dtype=np.float64)
    drawn = _short(_draw_weights(draws, generator))
    weights = np.concatenate([np.array([*_FIXED.values()], dtype=np.float64), drawn])
    placements = np.concatenate([fixed, _short(_draw_placements(draws, by_parameters, generator))])
    return Candidates(
        (*_FIXED, *(f"{DRAWN}{number}" for number in range(draws))),
        weights,
        np.clip(weights @ basis, -SCORE_BOUND, SCORE_BOUND),
        np.clip(placements, -SCORE_BOUND, SCORE_BOUND),
    )


def _short(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that half precision holds exactly: a log of them is a third as large."""
    return values.astype(np.float16).astype(np.float64)


def _draw_weights(draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Weights, (draws, len(BASIS))."""
    return np.stack(
        [
            generator.choice([0.0, 0.5, 1.0], draws),
            generator.normal(0, 0.4, draws),
            generator.normal(0, 0.6, draws),
            generator.choice([0.0, 1.0, 2.0], draws),
        ],
        axis=1,
    )


def _draw_placements(draws: int, by_parameters: bool, generator: np.random.Generator) -> NDArray[np.float64]:
    """Placements, (draws, 2). Under a budget of parameters, only a rank floor above 1 leaves modules out."""
    if by_parameters:
        depth_biases = generator.choice([0.0, 1.0], draws) * generator.normal(0, 1, draws)
        return np.stack([generator.uniform(-0.5, 3.0, draws), depth_biases], axis=1)
    return np.stack([generator.uniform(-4.0, 2.0, draws), generator.uniform(-4.0, 1.0, draws)], axis=1)
