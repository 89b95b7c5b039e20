"""Growth of a step's bytes with the rows and length of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.errors import UnsupportedError
from .recording import BatchShape, Recording
from .tile_size import LossTiles, TileTokens


@dataclass(frozen=True, eq=False)
class Growth:
    """Growth of recorded storages from their recorded shape; arrays have shape (storages,).

    Attributes:
        whole: the batch shape passed to `calibrate`.
        recorded: the recorded batch shape.
        row_power: exponent of the rows; NaN if unknown.
        length_power: exponent of the length, from two lengths.
        length_ratio: ratio of the shorter length to the longer; 1 if there was only one.
        missing: offset in tokens for storages proportional to the length minus an offset, else 0.
        multiple: multiple to which a kernel rounds the length, int64; 1 for none. The exponent of the length is then 0
            or 1, in addition to this.
        rounded: share of the recorded bytes that follows the rounded length; the rest follows the length.
        tiles: tokens of the recorded loss tile; 0 for other storages.
        tile_tokens: tokens per tile in a step; None without tiles.
    """

    whole: BatchShape
    recorded: BatchShape
    row_power: FloatArray
    length_power: FloatArray
    length_ratio: float
    missing: FloatArray
    multiple: IntArray
    rounded: FloatArray
    tiles: IntArray
    tile_tokens: TileTokens | None

    @classmethod
    def unknown(cls, shape: BatchShape, storages: int) -> Growth:
        """Create the growth of data-dependent operations, known only at the shape of their batch."""
        zeros = np.zeros(storages)
        return cls(
            whole=shape,
            recorded=shape,
            row_power=np.full(storages, np.nan),
            length_power=zeros,
            length_ratio=1.0,
            missing=zeros,
            multiple=np.ones(storages, dtype=np.int64),
            rounded=zeros,
            tiles=np.zeros(storages, dtype=np.int64),
            tile_tokens=None,
        )

    @classmethod
    def of(
        cls, whole: BatchShape, shapes: Sequence[BatchShape], recordings: Sequence[Recording], tiles: LossTiles
    ) -> Growth | None:
        """Fit the growth to three recordings; None if sizes do not follow the rows.

        Args:
            whole: the shape of the whole batch.
            shapes: shapes of the three batches: small, shorter, and the latter with one more row.
            recordings: recordings of the same operations.
            tiles: tiles of the loss.
        """
        (small, shorter, wider), (base, short, wide) = shapes, (recording.sizes for recording in recordings)
        row_ratio = wider.rows / shorter.rows
        row_power = _power(wide, short, row_ratio)
        irregular = np.abs(row_power - np.round(row_power)) > 0.1
        recorded, tokens = np.zeros(len(base), dtype=np.int64), tiles.tokens(shapes)
        if tokens:
            parts, divided = [tiles.tile(shape) for shape in shapes], [tiles.divided[shape] for shape in shapes]
            if len(set(parts)) == 1:  # tiles are indistinguishable from constants
                return None
            others = _proportional((base, short, wide), divided)  # both are the same if tiles are not rounded
            for sizes in ([tiles.last(shape) for shape in shapes], parts):
                recorded[_proportional((base, short, wide), sizes) & ~others] = sizes[0]
            irregular &= recorded == 0
        if wide[irregular].sum() > 0.01 * wide.sum():  # as in a mixture of experts with data-dependent sizes
            return None
        length_ratio = shorter.length / small.length
        missing = np.zeros(len(base))
        length_power, multiple, rounded = _power(base, short, 1 / length_ratio), np.ones(len(base), np.int64), missing
        if length_ratio != 1:
            missing = _missing_tokens(base, short, small.length, shorter.length)
            scratch = recordings[0].freed == recordings[0].created
            length_power, multiple, rounded = _rounded(
                (base, short), (small.length, shorter.length), length_power, (missing == 0) & (recorded == 0), scratch
            )
        return cls(
            whole=whole,
            recorded=small,
            row_power=row_power,
            length_power=length_power,
            length_ratio=length_ratio,
            missing=missing,
            multiple=multiple,
            rounded=rounded,
            tiles=recorded,
            tile_tokens=tokens,
        )

    def factor(self, shape: BatchShape) -> FloatArray:
        """Return the ratio of bytes at a shape to the recorded ones, (storages,).

        Raises:
            UnsupportedError: the recordings do not cover this shape.
        """
        recorded = self.recorded
        if not np.isfinite(self.row_power).all() and shape != recorded:
            raise UnsupportedError(
                f"Batches of {shape} cannot be predicted: this model's operations depend on its data, so only the "
                f"measured shape, {recorded}, is known. Calibrate with the larger batch."
            )
        if self.length_ratio == 1 and shape.length != recorded.length:
            raise UnsupportedError(
                f"Batches of {shape} cannot be predicted: the model was measured only with batches of {recorded}, "
                "and a single length does not show how memory grows with length. Calibrate with the longer batch."
            )
        factor = np.ones(len(self.row_power))
        if shape != recorded:
            factor = (shape.rows / recorded.rows) ** self.row_power * self._length_factor(shape.length)
        if self.tile_tokens:
            factor = np.where(self.tiles > 0, self.tile_tokens.tile(shape) / np.maximum(self.tiles, 1), factor)
        return factor

    @cached_property
    def kinds(self) -> tuple[Growth, IntArray]:
        """Return one growth per kind of storage, and the kind of each storage, int64 (storages,)."""
        table = np.stack([getattr(self, name) for name in OF_STORAGES], axis=1)
        _, first, kind = np.unique(table, axis=0, return_index=True, return_inverse=True)
        return replace(self, **{name: getattr(self, name)[first] for name in OF_STORAGES}), kind.ravel()

    def factors(self, rows: IntArray, lengths: IntArray) -> FloatArray:
        """Vectorised `factor` for supported shapes, given rows and lengths (shapes,): (shapes, storages)."""
        whole = (rows[:, None] / self.recorded.rows) ** self.row_power * self._length_factor(lengths[:, None])
        if not self.tile_tokens:
            return whole
        tiles = self.tile_tokens.tiles(rows, lengths)[:, None]
        return np.where(self.tiles > 0, tiles / np.maximum(self.tiles, 1), whole)

    def _length_factor(self, length: int | IntArray) -> FloatArray:
        """Return the growth factor of each storage with the length."""
        measured, recorded = self.length_ratio, self.recorded.length
        if measured == 1:  # the exponents are unknown
            return np.ones(len(self.length_power))
        # A size with a fractional exponent is a sum of both neighbours, as for labels padded by one token.
        whole = np.floor(self.length_power + 1e-9)
        share = (measured ** (self.length_power - whole) - measured) / (1 - measured)
        growth = (length / recorded) ** whole * (share + (1 - share) * length / recorded)
        growth = np.where(self.missing > 0, (length - self.missing) / (recorded - self.missing), growth)
        if (self.multiple == 1).all():
            return growth
        up = -(-length // self.multiple) / -(-recorded // self.multiple)
        parts = self.rounded * up + (1 - self.rounded) * length / recorded
        return np.where(self.multiple > 1, parts * (length / recorded) ** self.length_power, growth)


OF_STORAGES = ("row_power", "length_power", "missing", "multiple", "rounded", "tiles")
"""Attributes of `Growth` with one value per storage."""


def _proportional(sizes: Sequence[IntArray], tokens: Sequence[int]) -> BoolArray:
    """Return a mask of storages proportional to these tokens at three shapes, bool (storages,)."""
    (base, short, wide), (tile, short_tile, wide_tile) = sizes, tokens
    same: BoolArray = (base * short_tile == short * tile) & (wide * short_tile == short * wide_tile) & (base > 0)
    return same


_MULTIPLES = (8, 16, 32, 64, 128)
"""Multiples to which attention kernels round lengths."""


def _rounded(
    sizes: tuple[IntArray, IntArray],
    lengths: tuple[int, int],
    powers: FloatArray,
    asked: BoolArray,
    scratch: BoolArray,
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Fit `Growth.length_power`, `multiple` and `rounded` to sizes at two lengths, all (storages,).

    Args:
        sizes: sizes at these lengths, (storages,) each.
        lengths: the lengths, the larger one first.
        powers: exponents of the length without rounding.
        asked: mask of storages whose sizes have no other explanation.
        scratch: mask of scratch memory, where one entry may cover several tensors of an operator.
    """
    powers, multiple, rounded = powers.copy(), np.ones(len(powers), dtype=np.int64), np.zeros(len(powers))
    odd = asked & (np.abs(powers - np.round(powers)) > 1e-9)
    table = np.stack([*sizes, scratch], axis=1)[odd]
    for row in np.unique(table, axis=0).tolist():
        if found := _law((row[0], row[1]), lengths, parts=bool(row[2])):
            same = odd & (sizes[0] == row[0]) & (sizes[1] == row[1]) & (scratch == row[2])
            multiple[same], rounded[same], powers[same] = found
    return powers, multiple, rounded


def _law(sizes: tuple[int, int], lengths: tuple[int, int], *, parts: bool) -> tuple[int, float, int] | None:
    """Return the multiple, rounded share and extra exponent that explain two sizes; None if none do."""
    (large, small), (length, shorter) = sizes, lengths
    ups = [(each, length + -length % each, shorter + -shorter % each) for each in _MULTIPLES]
    for power in (0, 1):
        for multiple, up, down in ups:
            if large * down * shorter**power == small * up * length**power:
                return multiple, 1.0, power
    for multiple, up, down in ups[::-1] if parts else ():
        whole = up * shorter - down * length
        if whole == 0:
            continue
        (first, left), (second, also) = (
            divmod(value, whole) for value in (large * shorter - small * length, small * up - large * down)
        )
        if first > 0 and second > 0 and left == also == 0:
            return multiple, first * up / large, 0
    return None


def _power(larger: IntArray, smaller: IntArray, factor: float) -> FloatArray:
    """Return the exponent of `factor` in each size ratio, (storages,); 0 if the factor is 1."""
    if factor == 1:
        return np.zeros(len(larger))
    power: FloatArray = np.log(np.maximum(larger, 1) / np.maximum(smaller, 1)) / np.log(factor)
    return power


def _missing_tokens(larger: IntArray, smaller: IntArray, length: int, shorter: int) -> FloatArray:
    """Return `Growth.missing`, (storages,).

    A loss covers the tokens with a successor, one fewer than the length; there are two relative distances per token,
    less one. Two lengths alone would make these look partly quadratic.
    """
    missing = np.zeros(len(larger))
    for halves in (1, 2):
        proportional: BoolArray = larger * (2 * shorter - halves) == smaller * (2 * length - halves)
        missing[proportional & (larger > 0)] = halves / 2
    return missing
