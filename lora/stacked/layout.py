"""Where the factors of stacked adapters lie in a flat buffer, one row a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...common.arrays import IntArray

WIDTH_STEP = 16
"""Widths are multiples of this: see `lora.stacked`."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B^T of one module, (runs, width, d_in) and (runs, width, d_out)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the factors of each module lie in a row of a buffer: all of A first, then all of B^T.

    Attributes:
        widths: components of each module, int64 (modules,).
        d_in: int64 (modules,).
        d_out: int64 (modules,).
    """

    widths: IntArray
    d_in: IntArray
    d_out: IntArray

    @property
    def size(self) -> int:
        """Elements of a row."""
        return int(self.widths @ (self.d_in + self.d_out))

    @property
    def bounds(self) -> IntArray:
        """Where each block begins, A of all modules and then B^T of all, and the end, (2 * modules + 1,)."""
        sizes = np.concatenate([self.widths * self.d_in, self.widths * self.d_out])
        return np.concatenate([[0], np.cumsum(sizes)])

    @property
    def split(self) -> int:
        """Where B^T of the first module begins."""
        return int(self.widths @ self.d_in)

    def pairs(self, flat: torch.Tensor) -> list[Pair]:
        """Views of a buffer (runs, size), one pair a module."""
        starts, widths = self.bounds.tolist(), self.widths.tolist()
        dims = [*self.d_in.tolist(), *self.d_out.tolist()]
        views = [
            torch.unflatten(flat[:, start:end], 1, (width, d))
            for start, end, width, d in zip(starts, starts[1:], widths * 2, dims, strict=False)
        ]
        return list(zip(views[: len(widths)], views[len(widths) :], strict=True))
