"""The parts of a step: groups of rows run through the model together, each with a number of checkpointed layers.

A step is padded to its longest row, so most of it can be padding, and one long row determines the memory of all. Its
gradient is a sum over rows. Running the rows in parts, each padded to its own longest row, gives the same sum in less
time and memory.

The cost of a part increases with its rows and its longest row. Some optimal split then takes rows in order of length:
for two interleaved parts, swapping rows until they separate makes neither of them longer. A dynamic program over the
sorted rows therefore finds the fastest of all splits. The bytes of possible parts are interpolated between a few
predicted shapes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from ...common.arrays import FloatArray, IntArray
from ...common.errors import BudgetError
from ...cost.model import MemoryModel, ShapeBytes, holding_layers
from ...cost.recording import BatchShape

ShapeCost = Callable[[IntArray, IntArray, int], FloatArray]
"""Peak bytes or seconds of parts from their rows and lengths, both int64 (parts,), and checkpointed layers."""


@dataclass(frozen=True)
class Part:
    """Rows of a step run through the model together.

    Attributes:
        rows: their indices in the batch, increasing.
        length: tokens of the longest row.
        layers: number of checkpointed layers.
        packed: True if they are texts packed into one row; the length is then the sum of their tokens.
    """

    rows: tuple[int, ...]
    length: int
    layers: int
    packed: bool = False

    @property
    def height(self) -> int:
        """Rows of the rectangle."""
        return 1 if self.packed else len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of the rectangle, padding included."""
        return self.height * self.length


def plan_parts(
    lengths: IntArray,
    room: float,
    layers: Sequence[int],
    bytes_of: ShapeCost,
    seconds_of: ShapeCost,
    *,
    packed: bool = False,
    count: int | None = None,
) -> tuple[Part, ...]:
    """Return the fastest parts of a step within a memory limit, longest rows first.

    Ties go to the split with larger first parts. The result is deterministic.

    Args:
        lengths: tokens of each row, int64 (rows,), at least one row.
        room: maximum bytes of a part.
        layers: allowed numbers of checkpointed layers, increasing. Fewer of them take less time and more memory.
        bytes_of: peak bytes of a part; must increase with rows and length.
        seconds_of: seconds of a part; must increase with rows and length.
        packed: rows are texts, and each part packs its texts into one row. Only splits of texts in order of length are
            considered then.
        count: number of parts, from the fastest number up to the number of rows; default: the fastest number.

    Raises:
        BudgetError: the longest row does not fit alone with the most layers checkpointed; see `too_long`.
    """
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order]
    starts, ends = np.triu_indices(len(order))
    sums = np.append(0, longest.cumsum())
    together = np.ones_like(starts), sums[ends + 1] - sums[starts]
    rows, tokens = together if packed else (ends + 1 - starts, longest[starts])
    chosen = np.zeros(len(rows), dtype=np.int64)
    seconds = np.full(len(rows), np.inf)
    waiting = np.arange(len(rows))
    for again in layers:
        fits = bytes_of(rows[waiting], tokens[waiting], again) <= room
        fitting = waiting[fits]
        chosen[fitting] = again
        seconds[fitting] = seconds_of(rows[fitting], tokens[fitting], again)
        waiting = waiting[~fits]
        if not len(waiting):
            break
    if not np.isfinite(seconds[0]):  # the first pair is the longest row alone
        raise too_long(int(order[0]), int(longest[0]), room, layers[-1], bytes_of)
    table, layers_of = np.full((2, len(order) + 1, len(order)), np.inf)
    table[ends + 1, starts], layers_of[ends + 1, starts] = seconds, chosen
    parts: list[Part] = []
    end, firsts = len(order), _first_rows(table, count)
    while end:
        start = int(next(firsts)[end])
        chosen_rows = tuple(sorted(order[start:end].tolist()))
        length = longest[start:end].sum() if packed else longest[start]
        parts.append(Part(chosen_rows, int(length), int(layers_of[end, start]), packed))
        end = start
    return tuple(reversed(parts))


def _first_rows(table: FloatArray, count: int | None) -> Iterator[IntArray]:
    """Yield the start of each part by its end, int64 (rows + 1,), last part first.

    Args:
        table: seconds by the end and the start of a part, (rows + 1, rows); infinite if it does not fit.
        count: number of parts; None for the fastest number.
    """
    if count is None:
        least, first = np.zeros(len(table)), np.zeros(len(table), dtype=np.int64)
        for end in range(1, len(table)):
            totals = least[:end] + table[end, :end]
            first[end] = start = int(totals.argmin())
            least[end] = totals[start]
        return repeat(first)
    least, firsts = np.full(len(table), np.inf), list[IntArray]()
    least[0] = 0.0
    for _ in range(count):
        sums = least[:-1] + table
        firsts.append(sums.argmin(axis=1))
        least = sums.min(axis=1)
    return reversed(firsts)


def too_long(row: int, length: int, room: float, layers: int, bytes_of: ShapeCost) -> BudgetError:
    """Build the error for a row too long to fit alone; it states the longest length that fits.

    Args:
        row: its index in the batch.
        length: its tokens.
        room: maximum bytes.
        layers: maximum number of checkpointed layers.
        bytes_of: see `plan_parts`.
    """
    fits = longest_that_fits(length, room, layers, bytes_of)
    rest = f"the longest that fits has {fits:,}" if fits else "no row fits at all"
    return BudgetError(
        f"Row {row} of the batch has {length:,} tokens and does not fit on its "
        f"own{' with all layers checkpointed' if layers else ''}: {rest}. Truncate rows to that length, "
        "or raise the budget."
    )


def longest_that_fits(most: int, room: float, layers: int, bytes_of: ShapeCost) -> int:
    """Maximum tokens of a single row that fits, up to `most`; 0 if none does. See `plan_parts`."""
    one = np.ones(1, dtype=np.int64)
    return bisect_right(range(1, most + 1), room, key=lambda length: float(bytes_of(one, length * one, layers)[0]))


def parts_sentence(figures: Mapping[str, float]) -> str:
    """Describe a run's use of parts from its training log; empty if steps ran as a whole."""
    if figures.get("parts", 1.0) <= 1 and not figures.get("padding_saved"):
        return ""
    count = int(figures.get("batches_too_large", 0))
    large = f" {count:,} of them would not have fit whole." if count else ""
    return (
        f"Batches ran in {figures['parts']:.1f} parts on average, without {figures['padding_saved']:.0%} "
        f"of their padding.{large}"
    )


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
