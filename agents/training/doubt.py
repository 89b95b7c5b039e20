"""How far votes on plans for unseen models can be trusted, beside what the spread of the networks tells of it.

The spread alone tells less than half of it (docs/experiments.md). Plan by plan this is split conformal prediction
(Papadopoulos et al., 2002), with what networks have not learned from in place of a split, of the lower confidence bound
by which a policy chooses: what it is short of need not be told twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..learned.plan_value import learns_labels
from ..learned.policy import LCB_COEFFICIENT
from .plan_dataset import PlanDataset

SURE = 0.8
"""The share of plans for unseen tasks of which the bounds may not promise too much; see `doubt_of`."""

LEAST_REAL = 5
"""From so many real fine-tunes on, of labels or of texts, they alone tell how far votes on such runs can be trusted."""


def doubts_of(
    predicted: torch.Tensor, targets: torch.Tensor, ordered: PlanDataset, sizes: Sequence[int]
) -> tuple[float, float]:
    """The doubt in runs that learn texts and in those that learn labels; one is the other's where no task tells it.

    Args:
        predicted: what each network expects of plans that it has not learned from, NaN for others, (networks, rows).
        targets: what is true, (rows,).
        ordered: the rows in the order of the groups.
        sizes: of the groups.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    families, real = ordered.families.numpy()[starts], ordered.real.numpy()[starts]
    on_labels = np.array([learns_labels(run) for run in ordered.plans.run[starts].tolist()])
    excess = [
        _excess(*parts)
        for parts in zip(
            torch.split(predicted, list(sizes), dim=1),
            torch.split(targets, list(sizes)),
            torch.split(ordered.gains == ordered.reference_gains, list(sizes)),
            strict=True,
        )
    ]

    def doubt_in(kind: NDArray[np.bool_]) -> float:
        kind = kind if kind.any() else ~kind
        counted = kind & real if (kind & real).sum() >= LEAST_REAL else kind
        return doubt_of([part for part, counts in zip(excess, counted, strict=True) if counts], families[counted])

    return doubt_in(~on_labels), doubt_in(on_labels)


def _excess(predicted: torch.Tensor, targets: torch.Tensor, is_reference: torch.Tensor) -> torch.Tensor:
    """By how much the bounds of a group's plans, against plain LoRA, are above the truth, (rows,); (0,) if unknown.

    Args:
        predicted: by each network, (networks, rows).
        targets: (rows,).
        is_reference: which rows are plain LoRA, or ended like it, bool (rows,).
    """
    unseen = predicted[~predicted.isnan().any(dim=1)]
    if not len(unseen) or not is_reference.any() or is_reference.all():
        return targets[:0]
    votes = unseen - unseen[:, is_reference].mean(dim=1, keepdim=True)
    bound = votes.mean(dim=0) - LCB_COEFFICIENT * votes.std(dim=0, unbiased=False)
    return (bound - (targets - targets[is_reference].mean()))[~is_reference]


def doubt_of(excess: Sequence[torch.Tensor], families: NDArray[np.int64]) -> float:
    """By how much bounds promise too much at most, in the share `SURE` of plans; at least 0.

    All families count alike, however many tasks they have.

    Args:
        excess: of the plans of each group, (plans,); (0,) for a group that tells nothing.
        families: of the groups.
    """
    found: dict[int, list[torch.Tensor]] = {}
    for family, part in zip(families.tolist(), excess, strict=True):
        if len(part):
            found.setdefault(family, []).append(part)
    quantiles = [float(torch.cat(parts).quantile(SURE)) for parts in found.values()]
    return max(0.0, sum(quantiles) / len(quantiles)) if quantiles else 0.0
