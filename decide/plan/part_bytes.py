"""Bytes of the possible parts of a step under one plan, interpolated between a few predicted shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...common.arrays import FloatArray, IntArray
from ...cost.model import MemoryModel, ShapeBytes, holding_layers
from ...cost.recording import BatchShape
from .parts import Part

MOST_LEVELS = 8
"""Number of nonzero levels of checkpointed layers available to parts, evenly spread."""


class PlanBytes:
    """Bytes of the possible parts of a step under one plan.

    Args:
        memory: the byte model of the step, with all layers checkpointed if they may be chosen.
        ranks: the plan, int64 (modules,).
        most: the largest shape to be priced.
        chooses: True if layers may be chosen.
        each: rows of an example.

    Attributes:
        layers: names of the layers with saved activations, lowest first.
        levels: allowed numbers of checkpointed layers, ascending.
        most: as above.
    """

    def __init__(self, memory: MemoryModel, ranks: IntArray, most: BatchShape, *, chooses: bool, each: int) -> None:
        self._memory, self._ranks, self._each, self.most = memory, ranks, each, most
        self._first = replace(memory, accumulates=False)
        self.layers = holding_layers(memory, ranks) if chooses else ()
        self._chooses, count = chooses, len(self.layers)
        spread = np.unique(np.linspace(0, count, MOST_LEVELS + 1).round().astype(int))
        self.levels: tuple[int, ...] = tuple(spread.tolist())
        self._of_level: dict[int, ShapeBytes] = {}

    def __call__(self, examples: IntArray, lengths: IntArray, layers: int) -> FloatArray:
        """Return the peak bytes of parts by their examples and lengths, (parts,); see `ShapeCost`."""
        if layers not in self._of_level:
            rows, length = self.most.rows, self.most.length
            tokens = np.unique(np.geomspace(min(8, length), length, 4).round().astype(int)).tolist()
            corners = [BatchShape(count, size) for count in {self._each, rows} for size in tokens]
            self._of_level[layers] = self._with(layers).at_shapes(self._ranks, corners)
        return self._of_level[layers](examples * self._each, lengths)

    def of(self, part: Part) -> float:
        """Return the peak bytes of a part, interpolated between predicted shapes."""
        return float(self(np.array([part.height]), np.array([part.length]), part.layers)[0])

    def exact(self, part: Part, *, first: bool = False) -> float:
        """Return the peak bytes of a part, predicted as for a step; the `first` one has no gradients alongside."""
        shape = BatchShape(part.height * self._each, part.length)
        return self._with(part.layers, self._first if first else self._memory).peak(self._ranks, shape)

    def _with(self, layers: int, memory: MemoryModel | None = None) -> MemoryModel:
        memory = memory or self._memory
        return memory.with_checkpointed(self.layers[:layers]) if self._chooses else memory
