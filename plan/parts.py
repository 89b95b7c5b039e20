"""The parts of a step: which of its rows pass through the model together, and how many layers are checkpointed then.

A step is padded to its longest row, so that most of it can be padding and one long row decides the memory of all. Its
gradient is a sum over rows. Rows that run in parts, each padded to its own longest row, give the same sum in less time
and fewer bytes.

What a part takes rises with its rows and with its longest row. Then some best split takes rows in the order of their
length: of two parts that cross, swapping rows until they do not makes neither of them longer. So a dynamic program over
the sorted rows finds the least seconds of all splits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..errors import BudgetError

ShapeCost = Callable[[IntArray, IntArray, int], FloatArray]
"""Bytes at the peak, or seconds, of parts by their rows and lengths, both int64 (parts,), and checkpointed layers."""


@dataclass(frozen=True)
class Part:
    """Rows of a step that pass through the model together.

    Attributes:
        rows: their places in the batch, rising.
        length: tokens of the longest.
        layers: how many layers are checkpointed.
        packed: whether they are texts side by side in one row, of whose tokens the length is the sum.
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
    least: int = 1,
) -> tuple[Part, ...]:
    """The parts of a step that take the least seconds within some bytes; the longest rows come first.

    Of splits that take equally long the one with larger first parts is taken. The result follows from the arguments.

    Args:
        lengths: tokens of each row, int64 (rows,), at least one row.
        room: bytes that a part may take.
        layers: how many layers may be checkpointed, rising. Fewer of them take less time and more bytes.
        bytes_of: of a part at its peak; it must rise with rows and length.
        seconds_of: of a part; it must rise with rows and length.
        packed: rows are texts, and those of a part lie side by side in one row. Then only splits of texts in the order
            of their length are weighed.
        count: how many parts there are, from as many as take the least to the number of rows; by default the former.
        least: rows of a part at least, where there are so many.

    Raises:
        BudgetError: the longest row does not fit alone with the most layers checkpointed; see `too_long`.
    """
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order]
    starts, ends = np.triu_indices(len(order), min(least, len(order)) - 1)
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
    if not np.isfinite(seconds[0]):  # the first pair is the longest row alone, or the fewest that a part has
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
    """By where each part ends, where it begins, int64 (rows + 1,): of the last part first.

    Args:
        table: seconds by the end and the start of a part, (rows + 1, rows); infinite where it does not fit.
        count: how many parts there are; None for as many as take the least seconds.
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
    """The error of a row that does not fit alone; it tells the longest that does.

    Args:
        row: its place in the batch.
        length: its tokens.
        room: bytes that it may take.
        layers: the most that can be checkpointed.
        bytes_of: see `plan_parts`.
    """
    fits = longest_that_fits(length, room, layers, bytes_of)
    rest = f"the longest that fits has {fits:,}" if fits else "no row fits at all"
    return BudgetError(
        f"Row {row} of the batch has {length:,} tokens and does not fit alone"
        f"{' with all layers checkpointed' if layers else ''}: {rest}. Cut rows to that length, or raise the budget."
    )


def longest_that_fits(most: int, room: float, layers: int, bytes_of: ShapeCost) -> int:
    """The tokens of the longest row that fits alone, up to `most`; 0 if none does. See `plan_parts`."""
    one = np.ones(1, dtype=np.int64)
    return bisect_right(range(1, most + 1), room, key=lambda length: float(bytes_of(one, length * one, layers)[0]))


def parts_sentence(figures: Mapping[str, float]) -> str:
    """How the steps of a run ran, by what its training log shows of parts; empty where they ran as a whole."""
    if figures.get("parts", 1.0) <= 1 and not figures.get("padding_saved"):
        return ""
    count = int(figures.get("batches_too_large", 0))
    large = f" As a whole, {count:,} of them would not have fit." if count else ""
    return (
        f"Batches ran in {figures['parts']:.1f} parts in the mean, without {figures['padding_saved']:.0%} of their "
        f"padding.{large}"
    )


def padding_share(lengths: IntArray, parts: Sequence[Part]) -> float:
    """The share of the padding of one rectangle that some parts leave out, 0 where it has none."""
    rectangle, real = len(lengths) * int(lengths.max()), int(lengths.sum())
    in_parts = sum(part.tokens for part in parts)
    return (rectangle - in_parts) / (rectangle - real) if rectangle > real else 0.0
