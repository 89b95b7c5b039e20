"""What a step computes on a batch of any shape, from three lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..common.arrays import FloatArray
from .recording import BatchShape
from .step_time import StepWork
from .tile_size import LEAST_TOKENS, TILES

MASK_ALIGNMENT = 16
"""The memory-efficient kernel copies a mask whose rows are no multiple of this long."""


def counted_shapes(shape: BatchShape) -> tuple[BatchShape, ...]:
    """The shapes that are counted: that of a recording, a half of its length, and about three quarters.

    The last two differ by a multiple of `MASK_ALIGNMENT`, so that rows of a mask are aligned in both or in neither.
    There are so many rows that the loss has all its tiles.
    """
    half = max(shape.length // 2, 2)
    between = half + shape.length // 64 * MASK_ALIGNMENT if shape.length >= 64 else max(shape.length // 4, 2)
    rows = max(shape.rows, -(-TILES * LEAST_TOKENS // max(half - 1, 1)))
    return tuple(BatchShape(rows, length) for length in (shape.length, half, between))


@dataclass(frozen=True, eq=False)
class WorkGrowth:
    """What a step computes, operator by operator, at `counted_shapes`, or at one shape of which alone it tells.

    Attributes:
        shapes: at which it was counted.
        work: at the first of them.
        flops: floating-point operations of each operator at each shape, (shapes, operators).
        moved: bytes that it reads and writes, (shapes, operators).
    """

    shapes: tuple[BatchShape, ...]
    work: StepWork
    flops: FloatArray
    moved: FloatArray

    @classmethod
    def of(cls, shapes: Sequence[BatchShape], works: Sequence[StepWork]) -> WorkGrowth | None:
        """The growth that counts at these shapes tell; None if they are not of the same operators."""
        first, *others = works
        for other in others:
            if first.needed != other.needed or not all(
                np.array_equal(getattr(first, name), getattr(other, name)) for name in ("backward", "module", "layer")
            ):
                return None
        flops, moved = (np.stack([getattr(work, name) for work in works]) for name in ("flops", "moved"))
        return cls(tuple(shapes), first, flops, moved)

    def at(self, shape: BatchShape) -> StepWork:
        """What the step computes on a batch of this shape."""
        if shape == self.shapes[0]:
            return self.work
        return replace(self.work, flops=self._grown(self.flops, shape), moved=self._grown(self.moved, shape))

    def _grown(self, counted: FloatArray, shape: BatchShape) -> FloatArray:
        """A constant part, and two that grow with the rows: in proportion to the length, and to its square."""
        powers = np.array([[1, each.rows * each.length, each.rows * each.length**2] for each in self.shapes])
        parts = np.linalg.solve(powers.astype(np.float64), counted)
        here = np.array([1, shape.rows * shape.length, shape.rows * shape.length**2], dtype=np.float64)
        grown: FloatArray = np.maximum(np.round(here @ parts), 0.0)
        return grown
