"""How far votes on plans for unseen models can be trusted, beside what the spread of the networks tells of it.

A goal of cost takes the cheapest plan of which it is sure: the lower confidence bound of its vote, less the doubt, is
within the tolerance. The doubt is the least at which such plans keep to it on models that networks have not learned
from: calibration on held-out data, as in conformal risk control (Angelopoulos et al., 2022, arXiv 2208.02814). It is
that of the plans that are taken, since the cheapest of many is the one of which most is promised too much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...allocation.goal import CAUTION, vote_of
from ...common.arrays import FloatArray
from ..learned.plan_value import learns_labels
from .plan_dataset import PlanDataset

SURE = 0.8
"""The share of fine-tunes of unseen models whose plan, if it is not plain LoRA, loses no more than is tolerated."""

TOLERANCES = (0.005, 0.01, 0.02, 0.05)
"""The doubt is right on the mean of these."""

DOUBTS = np.arange(0.0, 4.01, 0.05).round(2)
"""What a doubt may be, in votes."""


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
    families = ordered.families.numpy()[starts]
    on_labels = np.array([learns_labels(run) for run in ordered.plans.run[starts].tolist()])
    adapted = (ordered.plans.ranks[:, 0] > 0).sum(dim=1)
    judged = [
        _judged(*parts)
        for parts in zip(
            torch.split(predicted, list(sizes), dim=1),
            torch.split(targets, list(sizes)),
            torch.split(adapted, list(sizes)),
            torch.split(ordered.gains == ordered.reference_gains, list(sizes)),
            strict=True,
        )
    ]

    def doubt_in(kind: NDArray[np.bool_]) -> float:
        counted = kind if kind.any() else ~kind
        return doubt_of([each for each, counts in zip(judged, counted, strict=True) if counts], families[counted])

    return doubt_in(~on_labels), doubt_in(on_labels)


def _judged(
    predicted: torch.Tensor, targets: torch.Tensor, adapted: torch.Tensor, is_reference: torch.Tensor
) -> FloatArray:
    """A group's plans, the cheapest first: lower confidence bounds and the truth, against plain LoRA, (2, plans).

    Plans that adapt fewer modules stand for cheaper ones. (2, 0) where nothing is known.

    Args:
        predicted: by each network, (networks, rows).
        targets: (rows,).
        adapted: modules, (rows,).
        is_reference: which rows are plain LoRA, or ended like it, bool (rows,).
    """
    unseen = predicted[~predicted.isnan().any(dim=1)]
    if not len(unseen) or not is_reference.any():
        return np.zeros((2, 0))
    votes = unseen - unseen[:, is_reference].mean(dim=1, keepdim=True)
    bounds = votes.mean(dim=0) - CAUTION * votes.std(dim=0, unbiased=False)
    truth = targets - targets[is_reference].mean()
    order = adapted[~is_reference].argsort(stable=True)
    return torch.stack([bounds, truth])[:, ~is_reference][:, order].double().numpy()


def doubt_of(judged: Sequence[FloatArray], families: NDArray[np.int64]) -> float:
    """The least doubt at which the share `SURE` of the plans that are taken lose no more than is tolerated.

    All families count alike, however many tasks they have. 0 where nothing is known.

    Args:
        judged: of each group, bounds on its plans and the truth, as votes against plain LoRA, (2, plans), the cheapest
            plan first.
        families: of the groups.
    """
    known = [[judged[group] for group in np.flatnonzero(families == family).tolist()] for family in np.unique(families)]
    for doubt in DOUBTS if known else ():
        if np.mean([_kept(groups, doubt) for groups in known]) >= SURE:
            return float(doubt)
    return float(DOUBTS[-1]) if known else 0.0


def _kept(groups: Sequence[FloatArray], doubt: float) -> float:
    """The share of plans taken in a family's groups that lose no more than is tolerated, on the mean of tolerances."""
    shares = []
    for least in map(vote_of, (-tolerance for tolerance in TOLERANCES)):
        sure = [(bounds - doubt >= least, truth) for bounds, truth in groups]
        taken = [truth[fits.argmax()] for fits, truth in sure if fits.any()]
        shares.append(float((np.array(taken) >= least).mean()) if taken else 1.0)
    return float(np.mean(shares))
