"""The tiles of a step's loss: how large they are in a run, and while small steps are recorded.

TRL has tiles of its own: `trl.kernels.chunked_logprob` multiplies the last hidden states with the output layer in tiles
of `TOKEN_CHUNK_SIZE` tokens, 4,096, forward and backward. Many a batch has fewer, so that its logits are one tile.
Where the output layer is frozen, no number of a token depends on another token: tiles of our size give the same losses
and gradients in fewer bytes (`use_own_tiles`).

A small recorded step would fill one tile in part, and the batch of a run fills several: a tile would be predicted as
large as all of them. So `LossTiles` gives small steps small tiles, and notes how many tokens they divide.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..common.arrays import IntArray
from .recording import BatchShape
from .tiled_loss import RECORDING, TiledCrossEntropy, TiledHeadLoss, TileSize, recorded_tile

MODULE, FUNCTION, TILE = "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", "TOKEN_CHUNK_SIZE"

_HEADS: list[Any] = []
"""References to output layers for which TRL's tiles have our size, a tuple of one for each run."""

_SIZERS: list[Any] = []
"""While steps are recorded, the last one says how large TRL's tiles are, from all tokens and the size of real ones; in
tuples of one."""

_UNWRAP: list[Callable[[], None]] = []


def use_own_tiles(model: nn.Module) -> Callable[[], None]:
    """Let TRL's fused loss have tiles of our size where a model's output layer is frozen; returns what undoes it.

    It is undone where the layer is freed, too, as that of a model that is only looked at.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        return lambda: None
    leave = _entered(_HEADS, weakref.ref(head))
    weakref.finalize(head, leave).atexit = False
    return leave


def _entered(entries: list[Any], entry: Any) -> Callable[[], None]:
    """Put an entry on one of the lists; returns what takes it off. TRL's function is wrapped while they hold any."""
    module = sys.modules.get(MODULE)
    if hasattr(module, FUNCTION) and hasattr(module, TILE) and not _HEADS and not _SIZERS:
        _UNWRAP.append(_wrapped(module))
    entries.append(held := (entry,))

    def leave() -> None:
        at = next((at for at, other in enumerate(entries) if other is held), None)
        if at is not None:  # it is called again where the layer is freed
            del entries[at]
        if _UNWRAP and not _HEADS and not _SIZERS:
            _UNWRAP.pop()()

    return leave


def tile_tokens(tokens: int, size: TileSize) -> int:
    """The tokens of a tile of so many tokens, also while a small step is recorded."""
    return int(_SIZERS[-1][0](tokens, size) if _SIZERS else size.of(tokens))


def _wrapped(module: Any) -> Callable[[], None]:
    """Let TRL's function have the tiles that the lists tell, in both passes; returns what undoes it."""
    function, usual = getattr(module, FUNCTION), getattr(module, TILE)
    forward, backward = function.forward, function.backward

    def in_tiles(size: int, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        setattr(module, TILE, size)
        try:
            return run(*arguments, **options)
        finally:
            setattr(module, TILE, usual)

    def sized(context: Any, hidden: Any, weight: Any, *rest: Any, **options: Any) -> Any:
        heads = (each() for (each,) in _HEADS)
        head = next((each for each in heads if each is not None and each.weight is weight), None)
        own = head is not None and not any(parameter.requires_grad for parameter in head.parameters())
        size, tokens = TileSize(most=usual) if own else TileSize(1, 1, usual), len(hidden)
        context.tile = tile_tokens(tokens, size)
        return in_tiles(context.tile, forward, context, hidden, weight, *rest, **options)

    def sized_backward(context: Any, *gradients: Any) -> Any:
        return in_tiles(getattr(context, "tile", usual), backward, context, *gradients)

    def unwrap() -> None:
        function.forward, function.backward = staticmethod(forward), staticmethod(backward)

    function.forward, function.backward = staticmethod(sized), staticmethod(sized_backward)
    return unwrap


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
        divided: by the shape of a batch, the tokens that its step has divided into tiles.
        size: of the tiles of a real step.
    """

    divided: dict[BatchShape, int]
    size: TileSize

    def __init__(self, whole: BatchShape) -> None:
        self.divided, self.size = {}, TileSize()
        self._whole = whole

    def tile(self, shape: BatchShape) -> int:
        """The tokens of a tile in the step of this shape that was recorded."""
        tokens = self.divided[shape]
        return self.size.of(tokens) if shape == self._whole else recorded_tile(tokens)

    def last(self, shape: BatchShape) -> int:
        """The same of the last tile, if tiles do not overlap."""
        return self.divided[shape] % self.tile(shape) or self.tile(shape)

    @contextmanager
    def scaled(self, shape: BatchShape) -> Iterator[None]:
        """Inside the context a batch of this shape has `RECORDED_TILES`, unless it is the whole batch."""
        whole, token = loss_tokens(self._whole), RECORDING.set(shape != self._whole)

        def note(tokens: int) -> None:
            self.divided[shape] = max(self.divided.get(shape, 0), tokens)

        def note_own(context: Any, rows: Any, *rest: Any) -> None:
            note(len(rows))

        def sizer(tokens: int, size: TileSize) -> int:
            if size.of(whole) == whole:  # one tile, in small steps as well
                return size.of(tokens)
            self.size = size
            note(tokens)
            return self.tile(shape)

        leave = _entered(_SIZERS, sizer)
        try:
            with _noted(TiledCrossEntropy, note_own), _noted(TiledHeadLoss, note_own):
                yield
        finally:
            leave()
            RECORDING.reset(token)

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


@contextmanager
def _noted(function: Any, note: Callable[..., None]) -> Iterator[None]:
    """Inside the context it is noted when an autograd function runs."""
    forward = function.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        note(*arguments)
        return forward(*arguments, **options)

    function.forward = staticmethod(noted)
    try:
        yield
    finally:
        function.forward = staticmethod(forward)


def loss_tokens(shape: BatchShape) -> int:
    """The tokens of a batch that have a next one, for which there is a loss."""
    return shape.rows * max(shape.length - 1, 1)
