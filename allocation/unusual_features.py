"""Which features of a module are unusual among all modules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNUSUAL = 1.0
"""Standard deviations from the mean of all modules."""


def unusual_features(names: Sequence[str], values: NDArray[np.floating]) -> list[list[tuple[str, float]]]:
    """For each module the two features that are farthest from the mean of all modules, farthest first.

    Features with fewer than three different values (flags) and distances below `UNUSUAL` are left out.

    Args:
        names: of the features.
        values: (modules, features); what is not finite is unknown.

    Returns:
        For each module up to two pairs (feature, distance in standard deviations).
    """
    kept, distances = [], []
    for name, column in zip(names, values.T.astype(np.float64), strict=True):
        known = column[np.isfinite(column)]
        if np.unique(known).size >= 3:
            kept.append(name)
            distances.append(np.nan_to_num((column - known.mean()) / known.std()))
    if not kept:
        return [[] for _ in values]
    rows = np.array(distances).T
    order = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :2].tolist()
    return [
        [(kept[i], float(row[i])) for i in chosen if abs(row[i]) >= UNUSUAL]
        for row, chosen in zip(rows, order, strict=True)
    ]
