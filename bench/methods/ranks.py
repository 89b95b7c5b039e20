"""Plans as short texts, such as "0x18 16x18": runs of equal ranks in the order of the modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from ...common.arrays import IntArray


def plan_text(ranks: Sequence[int] | IntArray) -> str:
    """The text of a plan, one rank for each module."""
    return " ".join(f"{rank}x{len(list(run))}" for rank, run in groupby(int(rank) for rank in ranks))


def plan_ranks(text: str) -> IntArray:
    """The plan of a text, int64 (modules,)."""
    runs = [tuple(map(int, run.split("x"))) for run in text.split()]
    return np.repeat([rank for rank, _ in runs], [count for _, count in runs]).astype(np.int64)
