"""Tokens per tile of the loss, in a run and in recorded small steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.arrays import IntArray
from .recording import BatchShape

TILES, LEAST_TOKENS = 16, 128
"""Number of tiles per batch, and the least tokens of a tile: products with fewer rows take longer per row, since each
reads the whole weight.
"""


RECORDED_TILES = 3
"""Number of tiles in a recorded small step. The second shows the remains of the first. With three tiles, each one token
larger, no two small batches have tiles in the ratio of their tokens, which separates tiles from storages proportional
to all tokens.
"""


@dataclass(frozen=True)
class TileSize:
    """Number of tokens per tile.

    Attributes:
        parts: number of tiles in a large batch.
        least: least tokens of a tile, unless the batch has fewer.
        most: most tokens of a tile; None for no limit.
    """

    parts: int = TILES
    least: int = LEAST_TOKENS
    most: int | None = None

    def of(self, tokens: int) -> int:
        """Return the tile size for a number of tokens."""
        wanted = max(-(-tokens // self.parts), self.least)
        return max(min(wanted, tokens, self.most or tokens), 1)


def recorded_tile(tokens: int) -> int:
    """Return the tile size in a recorded small step; see `RECORDED_TILES`."""
    return max(min(-(-tokens // RECORDED_TILES) + 1, tokens), 1)


@dataclass(frozen=True)
class TileTokens:
    """Tokens of a batch that are divided into tiles: for each row, `of_token` per token and `of_row`.

    In a real step, `size` sets the tokens per tile.
    """

    of_token: float
    of_row: float
    size: TileSize

    def tile(self, shape: BatchShape) -> int:
        """Return the tokens of a tile for a batch of this shape."""
        return self.size.of(round(shape.rows * (self.of_token * shape.length + self.of_row)))

    def tiles(self, rows: IntArray, lengths: IntArray) -> IntArray:
        """Return the same for many shapes, given rows and lengths, all int64 (shapes,)."""
        tokens = np.round(rows * (self.of_token * lengths + self.of_row)).astype(np.int64)
        wanted = np.maximum(-(-tokens // self.size.parts), self.size.least)
        return np.maximum(np.minimum(wanted, np.minimum(tokens, self.size.most or tokens)), 1)


class LossTiles:
    """Tiles of the loss in recorded steps of a batch.

    Args:
        whole: the shape of the whole batch.

    Attributes:
        whole: the shape of the whole batch.
        divided: number of tokens divided into tiles, by batch shape.
        size: tile size of a real step.
    """

    whole: BatchShape
    divided: dict[BatchShape, int]
    size: TileSize

    def __init__(self, whole: BatchShape) -> None:
        self.divided, self.size = {}, TileSize()
        self.whole = whole

    def tile(self, shape: BatchShape) -> int:
        """Return the tokens of a tile in the recorded step of this shape."""
        tokens = self.divided[shape]
        return self.size.of(tokens) if shape == self.whole else recorded_tile(tokens)

    def last(self, shape: BatchShape) -> int:
        """Return the same for the last tile, if tiles do not overlap."""
        return self.divided[shape] % self.tile(shape) or self.tile(shape)

    def tokens(self, shapes: Sequence[BatchShape]) -> TileTokens | None:
        """Fit the tiles' tokens to the batch shape; None if a step has no tiles.

        Args:
            shapes: shapes of three recorded batches: small, shorter, and the latter with one more row.
        """
        if any(shape not in self.divided for shape in shapes):
            return None
        (small, shorter, _), (each, fewer, _) = shapes, [self.divided[shape] / shape.rows for shape in shapes]
        if small.length == shorter.length:
            return TileTokens(each / small.length, 0.0, self.size)
        slope = (each - fewer) / (small.length - shorter.length)
        return TileTokens(slope, each - slope * small.length, self.size)


def loss_tokens(shape: BatchShape) -> int:
    """Return the number of tokens with a successor, and thus a loss."""
    return shape.rows * max(shape.length - 1, 1)
