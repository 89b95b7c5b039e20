"""How many tokens a tile of the loss has, in a run and while small steps are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.arrays import IntArray
from .recording import BatchShape

TILES, LEAST_TOKENS = 16, 128
"""Into how many tiles the tokens of a batch are divided, and the tokens that a tile has at least: a product with fewer
rows takes more time for each, since it reads the whole weight."""


RECORDED_TILES = 3
"""Tiles of a small step that is recorded. The second shows what is left of the first; with three, and a token more in
each, no two of the small batches have tiles in the ratio of their tokens, so that a tile is told from what has a share
of all tokens."""


@dataclass(frozen=True)
class TileSize:
    """How many tokens a tile has.

    Attributes:
        parts: tiles of a large batch.
        least: tokens of a tile, unless the batch has fewer.
        most: tokens of a tile; None for no limit.
    """

    parts: int = TILES
    least: int = LEAST_TOKENS
    most: int | None = None

    def of(self, tokens: int) -> int:
        """The tokens of a tile of so many tokens."""
        wanted = max(-(-tokens // self.parts), self.least)
        return max(min(wanted, tokens, self.most or tokens), 1)


def recorded_tile(tokens: int) -> int:
    """The same while a small step is recorded; see `RECORDED_TILES`."""
    return max(min(-(-tokens // RECORDED_TILES) + 1, tokens), 1)


@dataclass(frozen=True)
class TileTokens:
    """How many tokens of a batch the tiles divide: for each row, `of_token` of each token and `of_row`.

    A tile of a real step has `size` of them.
    """

    of_token: float
    of_row: float
    size: TileSize

    def tile(self, shape: BatchShape) -> int:
        """The tokens of a tile with a batch of this shape."""
        return self.size.of(round(shape.rows * (self.of_token * shape.length + self.of_row)))

    def tiles(self, rows: IntArray, lengths: IntArray) -> IntArray:
        """The same for many shapes, by their rows and lengths, all int64 (shapes,)."""
        tokens = np.round(rows * (self.of_token * lengths + self.of_row)).astype(np.int64)
        wanted = np.maximum(-(-tokens // self.size.parts), self.size.least)
        return np.maximum(np.minimum(wanted, np.minimum(tokens, self.size.most or tokens)), 1)


class LossTiles:
    """The tiles of the loss while steps of a batch are recorded.

    Args:
        whole: the shape of the whole batch.

    Attributes:
        whole: that shape.
        divided: by the shape of a batch, the tokens that its step has divided into tiles.
        size: of the tiles of a real step.
    """

    whole: BatchShape
    divided: dict[BatchShape, int]
    size: TileSize

    def __init__(self, whole: BatchShape) -> None:
        self.divided, self.size = {}, TileSize()
        self.whole = whole

    def tile(self, shape: BatchShape) -> int:
        """The tokens of a tile in the step of this shape that was recorded."""
        tokens = self.divided[shape]
        return self.size.of(tokens) if shape == self.whole else recorded_tile(tokens)

    def last(self, shape: BatchShape) -> int:
        """The same of the last tile, if tiles do not overlap."""
        return self.divided[shape] % self.tile(shape) or self.tile(shape)

    def tokens(self, shapes: Sequence[BatchShape]) -> TileTokens | None:
        """How the tokens of tiles follow from the shape of a batch; None if a step has no tiles.

        Args:
            shapes: of three batches that were recorded: small, shorter, and with one row more than that.
        """
        if any(shape not in self.divided for shape in shapes):
            return None
        (small, shorter, _), (each, fewer, _) = shapes, [self.divided[shape] / shape.rows for shape in shapes]
        if small.length == shorter.length:
            return TileTokens(each / small.length, 0.0, self.size)
        slope = (each - fewer) / (small.length - shorter.length)
        return TileTokens(slope, each - slope * small.length, self.size)


def loss_tokens(shape: BatchShape) -> int:
    """The tokens of a batch that have a next one, for which there is a loss."""
    return shape.rows * max(shape.length - 1, 1)
