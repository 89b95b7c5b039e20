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
        multiple: to multiples of so many tokens a kernel rounds the length, int64; 1 where none does. The power of the
            length is then 0 or 1, on top of that.
        rounded: the share of the recorded bytes that follows the rounded length, where the rest follows the length.
        tiles: the tokens of the tile of the loss that it was recorded as; 0 for others.
        tile_tokens: how many tokens a tile has in a step; None without tiles.
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
        """The growth of operations that depend on the data: only the shape of their batch is known."""
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
        table = np.stack([getattr(self, name) for name in OF_STORAGES], axis=1)
        _, first, kind = np.unique(table, axis=0, return_index=True, return_inverse=True)
        return replace(self, **{name: getattr(self, name)[first] for name in OF_STORAGES}), kind.ravel()

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
        growth = np.where(self.missing > 0, (length - self.missing) / (recorded - self.missing), growth)
        if (self.multiple == 1).all():
            return growth
        up = -(-length // self.multiple) / -(-recorded // self.multiple)
        parts = self.rounded * up + (1 - self.rounded) * length / recorded
        return np.where(self.multiple > 1, parts * (length / recorded) ** self.length_power, growth)


OF_STORAGES = ("row_power", "length_power", "missing", "multiple", "rounded", "tiles")
"""The attributes of `Growth` that have a value for each storage."""


def _proportional(sizes: Sequence[IntArray], tokens: Sequence[int]) -> BoolArray:
    """Which storages have sizes in proportion to these tokens at three shapes, bool (storages,)."""
    (base, short, wide), (tile, short_tile, wide_tile) = sizes, tokens
    same: BoolArray = (base * short_tile == short * tile) & (wide * short_tile == short * wide_tile) & (base > 0)
    return same


_MULTIPLES = (8, 16, 32, 64, 128)
"""To multiples of how many tokens kernels of attention round lengths."""


def _rounded(
    sizes: tuple[IntArray, IntArray],
    lengths: tuple[int, int],
    powers: FloatArray,
    asked: BoolArray,
    scratch: BoolArray,
) -> tuple[FloatArray, IntArray, FloatArray]:
    """`Growth.length_power`, `multiple` and `rounded` from sizes at two lengths, all (storages,).

    Args:
        sizes: at these lengths, (storages,) each.
        lengths: the larger one first.
        powers: of the length, where none is rounded.
        asked: which storages have sizes that nothing else explains.
        scratch: which are inside one operator, so that one may stand for several of its tensors.
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
    """The multiple, the rounded share and the further power of the length that explain two sizes; None if none do."""
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
