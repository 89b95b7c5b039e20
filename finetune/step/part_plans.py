"""Memory of the parts of a step under one plan, and the fastest parts of a batch within its limit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ...common.arrays import FloatArray, IntArray
from ...cost.model import MemoryModel
from ...cost.record.work import part_seconds_of
from ...cost.recording import BatchShape
from ...cost.streaming import PartSeconds
from ...decide.plan.parts import Part, PlanBytes, ShapeCost, longest_that_fits, plan_parts
from .batch_rows import BatchRows
from .plan_keeper import PlanKeeper

MULTIPLE = 8
"""Row lengths on a GPU are rounded up to this multiple, as padding allows: its products are then faster."""

MORE = 1.25
"""Factor by which the bytes of minimal parts rise, until they take no more seconds than the padded batch."""


class PartPlans:
    """Chooses the parts of batches.

    Args:
        keeper: keeps the plan of ranks, and knows its run, its limit and its byte model.
        fewest: True if parts take as few bytes as the longest row of the run, unless that takes more seconds than the
            padded batch with all layers checkpointed.

    Attributes:
        each: rows of an example.
        compiled: True if the model is compiled; all parts then use the plan's checkpointed layers.
        most: limit on the bytes of a part after an error; None without one.
        bytes: the bytes of parts, up to the shape of the latest batch; None before the first.
    """

    def __init__(self, keeper: PlanKeeper, *, fewest: bool) -> None:
        self._keeper, self._fewest = keeper, fewest
        self.each, self.compiled = 1, False
        self.most: float | None = None
        self.bytes: PlanBytes | None = None
        self._of_shapes: dict[BatchShape, PlanBytes] = {}
        self._memory: MemoryModel | None = None
        self._seconds: PartSeconds | None = None

    def forget(self) -> None:
        """Discard the prices of parts, since ranks have changed."""
        self.bytes = None
        self._of_shapes.clear()

    def of(self, rows: BatchRows, count: int | None) -> tuple[Part, ...]:
        """Return the parts of a batch; exactly `count` of them if given."""
        lengths = rows.lengths
        if self._keeper.run.device.type == "cuda" and not rows.packed:
            lengths = np.minimum(-(-lengths // MULTIPLE) * MULTIPLE, rows.shape.length)
        own = int(lengths.max())
        longest = max(own, self._keeper.now.shape.length) if self._fewest else own
        cost, seconds = self.bytes_now(BatchShape(rows.shape.rows, max(rows.shape.length, longest))), self._seconds
        assert seconds is not None, "made with the bytes"

        def bytes_of(examples: IntArray, tokens: IntArray, layers: int) -> FloatArray:
            return cost(examples, tokens, layers) + rows.token_bytes * examples * tokens

        def seconds_of(examples: IntArray, tokens: IntArray, layers: int) -> FloatArray:
            return seconds(examples * self.each, tokens, layers)

        def least_of(count: int, length: int, of: ShapeCost) -> float:
            return float(of(np.array([count]), np.array([length]), cost.levels[-1])[0])

        room = self._keeper.room_for(self._keeper.applier.ranks)
        room = room if self.most is None else min(room, self.most)
        if self._keeper.applier.fits():  # the row alone fits, by the exact prediction
            room = max(room, least_of(1, own, bytes_of))
        plan = partial(
            plan_parts,
            lengths,
            layers=cost.levels,
            bytes_of=bytes_of,
            seconds_of=seconds_of,
            packed=rows.packed,
            count=count,
        )
        if not self._fewest:
            return plan(room)
        rectangle = (1, rows.shape.length) if rows.packed else (rows.examples, own)
        given, whole = min(room, least_of(1, longest, bytes_of)), least_of(*rectangle, seconds_of)
        while True:
            parts = plan(given)
            shapes = ((np.array([part.height]), np.array([part.length]), part.layers) for part in parts)
            if given >= room or sum(float(seconds_of(*shape)[0]) for shape in shapes) <= whole:
                return parts
            given = min(MORE * given, room)

    def bytes_now(self, shape: BatchShape) -> PlanBytes:
        """Return the bytes of parts under the current plan, for batches up to a shape.

        They are computed for the next power of two tokens, regardless of history: a resumed run gets the same ones.
        """
        keeper = self._keeper
        memory = keeper.now.recorded
        assert memory is not None, "steps in parts have a byte model"
        if self._memory is not memory:
            self._memory = memory
            self._of_shapes.clear()
        most = BatchShape(shape.rows, 1 << (shape.length - 1).bit_length())
        if most not in self._of_shapes:
            self._of_shapes[most] = found = PlanBytes(
                memory,
                keeper.applier.ranks,
                most,
                chooses=keeper.now.layers is not None,
                each=self.each,
            )
            operators = int(memory.recording.created.max()) + 1
            self._seconds = part_seconds_of(keeper.run.model, operators, len(found.layers))
        self.bytes = self._of_shapes[most]
        if self.compiled:  # levels other than the plan's need further graphs
            self.bytes.levels = (len(keeper.checkpointed),)
        return self.bytes

    def longest_row(self, each: Sequence[BatchRows | None]) -> str:
        """Describe the longest row of some batches and the longest that fits alone, for an error."""
        found = [(rows.lengths, number) for number, rows in enumerate(each) if rows]
        if not found:
            return ""
        lengths, number = max(found, key=lambda pair: int(pair[0].max()))
        row, length = int(lengths.argmax()), int(lengths.max())
        cost = self.bytes_now(BatchShape(self.each, length))
        room = self._keeper.room_for(self._keeper.applier.ranks)
        fits = longest_that_fits(length, room, cost.levels[-1], cost)
        where = f" of batch {number}" if len(each) > 1 else ""
        return f"Row {row}{where} has {length:,} tokens; the longest row that fits on its own has {fits:,}."
