"""The tiles of a loss, which do not grow with a batch as other operations do.

`trl.kernels.chunked_logprob` multiplies the last hidden states with the head in tiles of at most `TOKEN_CHUNK_SIZE`
tokens. A small recorded step would fill one tile in part, and the batch of the run fills several: a tile would be
predicted as large as all of them. So while a small step is recorded, its tiles are as many as those of the whole batch.

Of `tiled_loss` there are always as many tiles, and their tokens are rounded up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .batch_shape import BatchShape
from .tiled_loss import TiledCrossEntropy, tile_size

MODULE, FUNCTION, TILE = "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", "TOKEN_CHUNK_SIZE"


class LossTiles:
    """Scales the tiles of TRL's fused loss while steps of a batch are recorded.

    Args:
        whole: the shape of the whole batch.

    Attributes:
        used: whether a step has run the fused loss.
        of_own: whether a step has run `TiledCrossEntropy`.
    """

    used: bool
    of_own: bool

    def __init__(self, whole: BatchShape) -> None:
        self.used = self.of_own = False
        self._whole, self._module = whole, sys.modules.get(MODULE)
        self._size: int | None = getattr(self._module, TILE, None)

    @property
    def size(self) -> int | None:
        """Tokens of a tile; None if no step has run the fused loss."""
        return self._size if self.used else None

    @property
    def count(self) -> int:
        """Tiles of the whole batch; 1 without the fused loss."""
        return -(-loss_tokens(self._whole) // self._size) if self.used and self._size else 1

    def tokens(self, shape: BatchShape) -> int:
        """Tokens of a tile while a batch of this shape is recorded; 1 without the fused loss."""
        return tile_tokens(loss_tokens(shape), loss_tokens(self._whole), self._size) if self._size else 1

    @contextmanager
    def scaled(self, shape: BatchShape) -> Iterator[None]:
        """Inside the context a batch of this shape has as many tiles as the whole batch."""
        function = getattr(self._module, FUNCTION, None)
        with _noted(TiledCrossEntropy, self._note_own), _noted(function, self._note):
            if function is not None and self._size is not None:
                setattr(self._module, TILE, self.tokens(shape))
            try:
                yield
            finally:
                if function is not None and self._size is not None:
                    setattr(self._module, TILE, self._size)

    def _note(self) -> None:
        self.used = True

    def _note_own(self) -> None:
        self.of_own = True


@contextmanager
def _noted(function: Any, note: Callable[[], None]) -> Iterator[None]:
    """Inside the context it is noted when an autograd function runs; None for one that is not there."""
    if function is None:
        yield
        return
    forward = function.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        note()
        return forward(*arguments, **options)

    function.forward = staticmethod(noted)
    try:
        yield
    finally:
        function.forward = staticmethod(forward)


def own_tile(shape: BatchShape) -> int:
    """The tokens of a tile of `tiled_loss` with a batch of this shape."""
    return tile_size(shape.rows * shape.length)


def loss_tokens(shape: BatchShape) -> int:
    """The tokens of a batch that have a next one, for which there is a loss."""
    return shape.rows * max(shape.length - 1, 1)


def tile_tokens(small: int, whole: int, size: int) -> int:
    """The tile of a small batch that is to it what a tile is to the whole batch; all in tokens."""
    tiles = -(-whole // size)
    if tiles == 1:
        return size
    scaled = -(-size * small // whole)
    return max(1, min(scaled, -(-small // (tiles - 1)) - 1))  # rounding must not save a tile
