"""The figures of ranks that a training log shows beside losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..allocation.controller import RankController


def rank_figures(
    controller: RankController[Any],
    predictions: Sequence[tuple[int, float]],
    recomputed: Sequence[str] | None,
    fresh_peaks: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Mean rank, adapted modules, cost of the plan, limit, and what else is known.

    Args:
        controller: of the run.
        predictions: (step, predicted cost of the plan) of each decision.
        recomputed: layers that run again; None where that is not chosen by the plan.
        fresh_peaks: (step, bytes at its peak) of the steps that were measured since the last figures.
    """
    ranks, unit = controller.ranks, controller.cost.unit
    figures = {
        "rank_mean": float(ranks.mean()),
        "rank_modules": float((ranks > 0).sum()),
        f"plan_{unit}": predictions[-1][1],
        f"budget_{unit}": float(controller.limit),
        "rank_decisions": float(len(predictions)),
    }
    if recomputed is not None:
        figures["recomputed_layers"] = float(len(recomputed))
    if controller.time:
        figures["plan_seconds"] = controller.time.of(ranks)
        if controller.time.beside is None:
            figures["budget_seconds"] = controller.time.seconds
    if fresh_peaks:
        figures["peak_bytes"] = float(max(peak for _, peak in fresh_peaks))
    return figures
