"""The computation of a step on a batch of any shape, from three lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..common.arrays import FloatArray
from .recording import BatchShape
from .step_time import StepWork
from .tile_size import LEAST_TOKENS, TILES

MASK_ALIGNMENT = 16
"""The memory-efficient kernel copies a mask unless its row length is a multiple of this."""


def counted_shapes(shape: BatchShape) -> tuple[BatchShape, ...]:
    """Return the counted shapes: that of a recording, half its length, and about three quarters.

    The last two differ by a multiple of `MASK_ALIGNMENT`, so mask rows are aligned in both or in neither. Rows are
    numerous enough for the loss to have all its tiles.
    """
    half = max(shape.length // 2, 2)
    between = half + shape.length // 64 * MASK_ALIGNMENT if shape.length >= 64 else max(shape.length // 4, 2)
    rows = max(shape.rows, -(-TILES * LEAST_TOKENS // max(half - 1, 1)))
    return tuple(BatchShape(rows, length) for length in (shape.length, half, between))


@dataclass(frozen=True, eq=False)
class WorkGrowth:
    """The computation of a step per operator, at `counted_shapes`, or at the only supported shape.

    Attributes:
        shapes: the counted shapes.
        work: the work at the first of them.
        flops: floating-point operations of each operator at each shape, (shapes, operators).
        moved: bytes it reads and writes, (shapes, operators).
    """

    shapes: tuple[BatchShape, ...]
    work: StepWork
    flops: FloatArray
    moved: FloatArray

    @classmethod
    def of(cls, shapes: Sequence[BatchShape], works: Sequence[StepWork]) -> WorkGrowth | None:
        """Fit the growth to counts at these shapes; None if their operators differ."""
        first, *others = works
        for other in others:
            if first.needed != other.needed or not all(
                np.array_equal(getattr(first, name), getattr(other, name)) for name in ("backward", "module", "layer")
            ):
                return None
        flops, moved = (np.stack([getattr(work, name) for work in works]) for name in ("flops", "moved"))
        return cls(tuple(shapes), first, flops, moved)

    def at(self, shape: BatchShape) -> StepWork:
        """Return the computation of the step on a batch of this shape."""
        if shape == self.shapes[0]:
            return self.work
        return replace(self.work, flops=self._grown(self.flops, shape), moved=self._grown(self.moved, shape))

    def _grown(self, counted: FloatArray, shape: BatchShape) -> FloatArray:
        """Extrapolate a constant and two parts per row: proportional to the length, and to its square."""
        powers = np.array([[1, each.rows * each.length, each.rows * each.length**2] for each in self.shapes])
        parts = np.linalg.solve(powers.astype(np.float64), counted)
        here = np.array([1, shape.rows * shape.length, shape.rows * shape.length**2], dtype=np.float64)
        grown: FloatArray = np.maximum(np.round(here @ parts), 0.0)
        return grown
