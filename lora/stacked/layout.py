"""The positions of stacked factors in a flat buffer with one row for each run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...common.arrays import IntArray

WIDTH_STEP = 16
"""Widths are multiples of this, for the reason given in `lora/stacked/adapters.py`."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B^T of one module, (runs, width, d_in) and (runs, width, d_out)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The positions of all factors in a row of a buffer: A of all modules first, then B^T of all modules.

    Attributes:
        widths: components for which each module has room, int64 (modules,).
        d_in: input width of each module, int64 (modules,).
        d_out: output width of each module, int64 (modules,).
    """

    widths: IntArray
    d_in: IntArray
    d_out: IntArray

    @property
    def size(self) -> int:
        """Number of elements in a row."""
        return int(self.widths @ (self.d_in + self.d_out))

    @property
    def bounds(self) -> IntArray:
        """Start of each factor in a row, A of all modules then B^T of all, and the row's end, (2 * modules + 1,)."""
        sizes = np.concatenate([self.widths * self.d_in, self.widths * self.d_out])
        return np.concatenate([[0], np.cumsum(sizes)])

    @property
    def split(self) -> int:
        """Start of the first module's B^T in a row."""
        return int(self.widths @ self.d_in)

    def pairs(self, flat: torch.Tensor) -> list[Pair]:
        """Views of a buffer (runs, size), one pair for each module."""
        starts, widths = self.bounds.tolist(), self.widths.tolist()
        dims = [*self.d_in.tolist(), *self.d_out.tolist()]
        views = [
            torch.unflatten(flat[:, start:end], 1, (width, d))
            for start, end, width, d in zip(starts, starts[1:], widths * 2, dims, strict=False)
        ]
        return list(zip(views[: len(widths)], views[len(widths) :], strict=True))
