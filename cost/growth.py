"""How the bytes of a step grow with the rows and the length of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import UnsupportedError
from .recording import BatchShape, Recording
from .tile_size import LossTiles, TileTokens


@dataclass(frozen=True, eq=False)
class Growth:
    """How recorded storages grow from the shape at which they were recorded; arrays have shape (storages,).

    Attributes:
        whole: the shape of the batch that was given to `calibrate`.
        recorded: the shape of the batch that was recorded.
        row_power: the power of the rows; NaN if it is not known.
        length_power: the power of the length, from two lengths.
        length_ratio: the shorter of these lengths over the other; 1 if there was only one.
        missing: tokens by which the length is too high where a storage is proportional to the rest, else 0.
        tiles: the tokens of the tile of the loss that it was recorded as; 0 for others.
        tile_tokens: how many tokens a tile has in a step; None without tiles.
    """

    whole: BatchShape
    recorded: BatchShape
    row_power: FloatArray
    length_power: FloatArray
    length_ratio: float
    missing: FloatArray
    tiles: IntArray
    tile_tokens: TileTokens | None

    @classmethod
    def unknown(cls, shape: BatchShape, storages: int) -> Growth:
        """The growth of operations that depend on the data: only the shape of their batch is known."""
        zeros = np.zeros(storages)
        return cls(
            whole=shape,
            recorded=shape,
            row_power=np.full(storages, np.nan),
            length_power=zeros,
            length_ratio=1.0,
            missing=zeros,
            tiles=np.zeros(storages, dtype=np.int64),
            tile_tokens=None,
        )

    @classmethod
    def of(
        cls, whole: BatchShape, shapes: Sequence[BatchShape], recordings: Sequence[Recording], tiles: LossTiles
    ) -> Growth | None:
        """The growth that three recordings tell; None if sizes do not follow the rows.

        Args:
            whole: the shape of the whole batch.
            shapes: of the three batches: small, shorter, and with one row more than that.
            recordings: of the same operations.
            tiles: of the loss.
        """
        (small, shorter, wider), (base, short, wide) = shapes, (recording.sizes for recording in recordings)
        row_ratio = wider.rows / shorter.rows
        row_power = _power(wide, short, row_ratio)
        irregular = np.abs(row_power - np.round(row_power)) > 0.1
        recorded, tokens = np.zeros(len(base), dtype=np.int64), tiles.tokens(shapes)
        if tokens:
            parts, divided = [tiles.tile(shape) for shape in shapes], [tiles.divided[shape] for shape in shapes]
            if len(set(parts)) == 1:  # a tile looks like what does not grow
                return None
            others = _proportional((base, short, wide), divided)  # where tiles are not rounded, both are the same
            for sizes in ([tiles.last(shape) for shape in shapes], parts):
                recorded[_proportional((base, short, wide), sizes) & ~others] = sizes[0]
            irregular &= recorded == 0
        if wide[irregular].sum() > 0.01 * wide.sum():  # as a mixture of experts', whose sizes follow the data
            return None
        length_ratio = shorter.length / small.length
        missing = _missing_tokens(base, short, small.length, shorter.length)
        return cls(
            whole=whole,
            recorded=small,
            row_power=row_power,
            length_power=_power(base, short, 1 / length_ratio),
            length_ratio=length_ratio,
            missing=np.zeros(len(base)) if length_ratio == 1 else missing,
            tiles=recorded,
            tile_tokens=tokens,
        )

    def factor(self, shape: BatchShape) -> FloatArray:
        """The bytes at a shape over the recorded ones, (storages,).

        Raises:
            UnsupportedError: that shape cannot be told from what was recorded.
        """
        recorded = self.recorded
        if not np.isfinite(self.row_power).all() and shape != recorded:
            raise UnsupportedError(
                f"Batches of {shape} cannot be predicted: the operations of this model depend on its data, so only "
                f"the shape that was measured, {recorded}, is known. Calibrate with the larger batch."
            )
        if self.length_ratio == 1 and shape.length != recorded.length:
            raise UnsupportedError(
                f"Batches of {shape} cannot be predicted: the model was measured with batches of {recorded}, and one "
                "length does not tell how memory grows with length. Calibrate with the longer batch."
            )
        factor = np.ones(len(self.row_power))
        if shape != recorded:
            factor = (shape.rows / recorded.rows) ** self.row_power * self._length_factor(shape.length)
        if self.tile_tokens:
            factor = np.where(self.tiles > 0, self.tile_tokens.tile(shape) / np.maximum(self.tiles, 1), factor)
        return factor

    @cached_property
    def kinds(self) -> tuple[Growth, IntArray]:
        """The growth of one storage of each kind that grows alike, and the kind of each storage, int64 (storages,)."""
        table = np.stack([self.row_power, self.length_power, self.missing, self.tiles], axis=1)
        _, first, kind = np.unique(table, axis=0, return_index=True, return_inverse=True)
        names = ("row_power", "length_power", "missing", "tiles")
        return replace(self, **{name: getattr(self, name)[first] for name in names}), kind.ravel()

    def factors(self, rows: IntArray, lengths: IntArray) -> FloatArray:
        """`factor` at many shapes that can be told, by their rows and lengths, both (shapes,): (shapes, storages)."""
        whole = (rows[:, None] / self.recorded.rows) ** self.row_power * self._length_factor(lengths[:, None])
        if not self.tile_tokens:
            return whole
        tiles = self.tile_tokens.tiles(rows, lengths)[:, None]
        return np.where(self.tiles > 0, tiles / np.maximum(self.tiles, 1), whole)

    def _length_factor(self, length: int | IntArray) -> FloatArray:
        """The factor by which each storage grows with the length."""
        measured, recorded = self.length_ratio, self.recorded.length
        if measured == 1:  # the powers are not known
            return np.ones(len(self.length_power))
        # A size with a power between two whole ones is a sum of both, as for labels that were padded by one token.
        whole = np.floor(self.length_power + 1e-9)
        share = (measured ** (self.length_power - whole) - measured) / (1 - measured)
        growth = (length / recorded) ** whole * (share + (1 - share) * length / recorded)
        return np.where(self.missing > 0, (length - self.missing) / (recorded - self.missing), growth)


def _proportional(sizes: Sequence[IntArray], tokens: Sequence[int]) -> BoolArray:
    """Which storages have sizes in proportion to these tokens at three shapes, bool (storages,)."""
    (base, short, wide), (tile, short_tile, wide_tile) = sizes, tokens
    same: BoolArray = (base * short_tile == short * tile) & (wide * short_tile == short * wide_tile) & (base > 0)
    return same


def _power(larger: IntArray, smaller: IntArray, factor: float) -> FloatArray:
    """The power of `factor` by which each size is larger, (storages,); 0 if the factor is 1."""
    if factor == 1:
        return np.zeros(len(larger))
    power: FloatArray = np.log(np.maximum(larger, 1) / np.maximum(smaller, 1)) / np.log(factor)
    return power


def _missing_tokens(larger: IntArray, smaller: IntArray, length: int, shorter: int) -> FloatArray:
    """See `Growth.missing`; (storages,).

    A loss counts the tokens that have a next one, one less than the length; distances between tokens are two for each,
    less one. From sizes at two lengths alone, these would be read as partly quadratic.
    """
    missing = np.zeros(len(larger))
    for halves in (1, 2):
        proportional: BoolArray = larger * (2 * shorter - halves) == smaller * (2 * length - halves)
        missing[proportional & (larger > 0)] = halves / 2
    return missing
