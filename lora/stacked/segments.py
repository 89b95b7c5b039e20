"""The products of one module with the factors of the runs in a batch, each at about its own width.

The buffers give all runs one width, zero beyond each rank. But zeros cost as much as other numbers: so neighbours in
the batch that have about the same width share their products (a segment), and runs without an adapter take no part.
What is left out are products of zeros, and widths are multiples of 16: so results are those of the whole width, bit for
bit.

The positions of stacked factors in a flat buffer with one row for each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


OVERHEAD = 3e6
"""What the calls of a segment, forward and backward, cost in multiplications and additions (60 us on one CPU core)."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbours in a batch that share the products of a module.

    Attributes:
        place: of the runs in the batch.
        scaling: of each run, (runs, 1, 1).
        weights: A and B^T of all runs at the width of the segment, views of the buffers.
        gradients: theirs.
        rows: of the runs in the buffers: a slice if they are neighbours there too, else int64 (runs,).
    """

    place: slice
    scaling: torch.Tensor
    weights: Pair
    gradients: Pair
    rows: slice | torch.Tensor

    def factors(self) -> Pair:
        """A (runs, width, d_in) and B^T (runs, width, d_out) now."""
        a, b = self.weights
        return a[self.rows], b[self.rows]


def cut(ranks: Sequence[int], operations: float) -> list[tuple[int, int, int]]:
    """The segments with the lowest cost: start, end and width of each; runs of rank 0 may be outside of all.

    Args:
        ranks: of the runs in the batch.
        operations: multiplications and additions of one run and one component, forward and backward.
    """
    widths = [-(-rank // WIDTH_STEP) * WIDTH_STEP for rank in ranks]
    if len(set(widths)) == 1:
        return [(0, len(widths), widths[0])] if widths[0] else []
    costs: list[float] = [0.0]
    last: list[tuple[int, int] | None] = [None]
    for end, width in enumerate(widths, start=1):
        best, segment, widest = (costs[-1], None, 0) if not width else (float("inf"), None, 0)
        for start in range(end - 1, -1, -1) if width else ():
            widest = max(widest, widths[start])
            cost = costs[start] + OVERHEAD + operations * widest * (end - start)
            if cost < best:
                best, segment = cost, (start, widest)
        costs.append(best)
        last.append(segment)
    segments, end = [], len(widths)
    while end:
        found = last[end]
        if found:
            segments.append((found[0], end, found[1]))
        end = found[0] if found else end - 1
    return segments[::-1]


def make_segments(
    rows: Sequence[int], ranks: Sequence[int], tokens: int, scalings: torch.Tensor, weights: Pair, gradients: Pair
) -> list[Segment]:
    """The segments of a module.

    Args:
        rows: of the runs in the batch, in the buffers.
        ranks: theirs in this module.
        tokens: of each run.
        scalings: of the runs in the batch, (runs, 1, 1).
        weights: A and B^T of all runs, views of the buffers.
        gradients: theirs.
    """
    a, b = weights
    segments = []
    for start, end, width in cut(ranks, 6.0 * tokens * (a.shape[2] + b.shape[2])):
        own = list(rows[start:end])
        neighbours = own == list(range(own[0], own[0] + len(own)))
        index = slice(own[0], own[-1] + 1) if neighbours else torch.tensor(own, device=a.device)
        views = [(pair[0][:, :width], pair[1][:, :width]) for pair in (weights, gradients)]
        segments.append(Segment(slice(start, end), scalings[start:end], views[0], views[1], index))
    return segments


def add_deltas(y: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Add s * x A^T B^T to y in place; y is (runs, tokens, d_out), x is (runs, tokens, d_in)."""
    for segment in segments:
        a, b = segment.factors()
        y[segment.place].baddbmm_(torch.bmm(x[segment.place], a.mT).mul_(segment.scaling), b)
    return y


class AddDeltas(torch.autograd.Function):
    """`add_deltas`; the backward pass writes the gradients of A and B into their buffers."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment], anchor: torch.Tensor
    ) -> torch.Tensor:
        """The anchor requires a gradient, so that autograd calls `backward` even if y and x do not."""
        del anchor
        kept = []
        for segment in segments:
            a, b = segment.factors()
            hidden = torch.bmm(x[segment.place], a.mT).mul_(segment.scaling)
            y[segment.place].baddbmm_(hidden, b)
            kept += [hidden, a, b]
        ctx.save_for_backward(x, *kept)
        ctx.segments = segments
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of y and x."""
        x, *kept = ctx.saved_tensors
        (grad_y,) = outputs
        grad_x = None
        if ctx.needs_input_grad[1]:
            covered = sum(segment.place.stop - segment.place.start for segment in ctx.segments)
            grad_x = torch.empty_like(x) if covered == len(x) else torch.zeros_like(x)
        for number, segment in enumerate(ctx.segments):
            hidden, a, b = kept[3 * number : 3 * number + 3]
            upper, grad = grad_y[segment.place], segment.gradients
            grad_hidden = torch.bmm(upper, b.mT).mul_(segment.scaling)
            grad[0][segment.rows] = torch.bmm(grad_hidden.mT, x[segment.place])
            grad[1][segment.rows] = torch.bmm(hidden.mT, upper)
            if grad_x is not None:
                torch.bmm(grad_hidden, a, out=grad_x[segment.place])
        return grad_y, grad_x, None, None
