"""Candidates: the actions from which a learned policy chooses at a decision.

Some are fixed: those of the rules and the actor's. Others are drawn. Their scores are weighted sums of the mean signal,
the cost of a rank, the relative depth and the actor's scores. Weights and placements are drawn from wide distributions,
because nobody knows in advance how deep adapters should go, or how far signals can be trusted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...allocation.actions import SCORE_BOUND, base_rank_floor
from ...allocation.observation import Observation, module_feature
from ...allocation.plan import uniform_window
from ...common.arrays import FloatArray
from ...memory.cost import ParameterCost
from ..rules.by_signal import signal_mean

BASIS = ("signal_mean", "rank_cost", "relative_depth", "actor")
"""The scores of candidates are weighted sums of these."""

_FIXED_GAINS = ((0, 0, 0, 0), (0, 0, 0, 0), (0.5, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1))
"""Weights of the fixed candidates: uniform, top-down, signal-mean, top-down-mlp and the actor's."""

FIXED = len(_FIXED_GAINS)
"""Number of fixed candidates; they come first."""


def candidate_actions(
    observation: Observation, scores: FloatArray, placement: FloatArray, draws: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """The candidates at a decision.

    Args:
        observation: of the decision.
        scores: the actor's, (modules,).
        placement: the actor's, (2,).
        draws: number of candidates that are drawn, beside the fixed ones.
        generator: draws them.

    Returns:
        Scores (FIXED + draws, modules), and placements (FIXED + draws, 2).
    """
    problem = observation.problem
    by_parameters = isinstance(problem.cost, ParameterCost)
    parts = (signal_mean(observation), *(module_feature(observation, name) for name in BASIS[1:3]), scores)
    basis = np.stack([part - part.mean() for part in parts])
    rank, _ = uniform_window(problem.fresh()) or (1, 0)
    uniform = (np.log2(rank / base_rank_floor(problem)), 0)
    fixed = np.array([uniform, (0, 0), (0, 0), (0, 0), tuple(placement)], dtype=np.float64)
    gains = np.concatenate([np.array(_FIXED_GAINS, dtype=np.float64), _draw_gains(draws, generator)])
    placements = np.concatenate([fixed, _draw_placements(draws, by_parameters, generator)])
    return np.clip(gains @ basis, -SCORE_BOUND, SCORE_BOUND), np.clip(placements, -SCORE_BOUND, SCORE_BOUND)


def _draw_gains(draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
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
