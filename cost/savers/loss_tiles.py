"""Tile sizes of a step's loss, in a run and in recorded small steps.

TRL tiles its own loss: `trl.kernels.chunked_logprob` multiplies the last hidden states with the output layer in tiles
of `TOKEN_CHUNK_SIZE` tokens, 4,096, forward and backward. Many batches are smaller, so their logits form one tile. With
a frozen output layer, tokens are independent: tiles of our size give the same losses and gradients in less memory
(`use_own_tiles`).

A small recorded step would fill part of one tile, and a run's batch fills several: the prediction would merge them into
one large tile. `scaled` therefore gives small steps small tiles, and records the number of tokens they divide.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..recording import BatchShape
from ..tile_size import LossTiles, TileSize, loss_tokens
from .tiled_loss import RECORDING, TiledCrossEntropy, TiledHeadLoss

MODULE, FUNCTION, TILE = "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", "TOKEN_CHUNK_SIZE"

_HEADS: list[Any] = []
"""References to output layers for which TRL's tiles get our size, a one-element tuple per run."""

_SIZERS: list[Any] = []
"""Stack of functions for TRL's tile size in recorded steps, from all tokens and the real tile size, in one-element
tuples.
"""

_UNWRAP: list[Callable[[], None]] = []


def use_own_tiles(model: nn.Module) -> Callable[[], None]:
    """Give TRL's fused loss our tile size for a frozen output layer; returns a function to undo it.

    Also undone once the layer is freed, for models that are only inspected.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        return lambda: None
    leave = _entered(_HEADS, weakref.ref(head))
    weakref.finalize(head, leave).atexit = False
    return leave


def _entered(entries: list[Any], entry: Any) -> Callable[[], None]:
    """Push an entry on one of the lists; returns a function to remove it. TRL's function stays wrapped meanwhile."""
    module = sys.modules.get(MODULE)
    if hasattr(module, FUNCTION) and hasattr(module, TILE) and not _HEADS and not _SIZERS:
        _UNWRAP.append(_wrapped(module))
    entries.append(held := (entry,))

    def leave() -> None:
        at = next((at for at, other in enumerate(entries) if other is held), None)
        if at is not None:  # called again when the layer is freed
            del entries[at]
        if _UNWRAP and not _HEADS and not _SIZERS:
            _UNWRAP.pop()()

    return leave


def tile_size(weight: Any, usual: int) -> TileSize:
    """Return the tile size of a fused loss with an output layer of this weight; `usual` is that of the kernel."""
    heads = (each() for (each,) in _HEADS)
    head = next((each for each in heads if each is not None and each.weight is weight), None)
    own = head is not None and not any(parameter.requires_grad for parameter in head.parameters())
    return TileSize(most=usual) if own else TileSize(1, 1, usual)


def tile_tokens(tokens: int, size: TileSize) -> int:
    """Return the tile size for a number of tokens, also in recorded small steps."""
    return int(_SIZERS[-1][0](tokens, size) if _SIZERS else size.of(tokens))


def _wrapped(module: Any) -> Callable[[], None]:
    """Apply the lists' tile sizes to TRL's function in both passes; returns a function to undo it."""
    function, usual = getattr(module, FUNCTION), getattr(module, TILE)
    forward, backward = function.forward, function.backward

    def in_tiles(size: int, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        setattr(module, TILE, size)
        try:
            return run(*arguments, **options)
        finally:
            setattr(module, TILE, usual)

    def sized(context: Any, hidden: Any, weight: Any, *rest: Any, **options: Any) -> Any:
        context.tile = tile_tokens(len(hidden), tile_size(weight, usual))
        return in_tiles(context.tile, forward, context, hidden, weight, *rest, **options)

    def sized_backward(context: Any, *gradients: Any) -> Any:
        return in_tiles(getattr(context, "tile", usual), backward, context, *gradients)

    def unwrap() -> None:
        function.forward, function.backward = staticmethod(forward), staticmethod(backward)

    function.forward, function.backward = staticmethod(sized), staticmethod(sized_backward)
    return unwrap


@contextmanager
def scaled(tiles: LossTiles, shape: BatchShape) -> Iterator[None]:
    """Give a batch of this shape `RECORDED_TILES` inside the context, unless it is the whole batch."""
    whole, token = loss_tokens(tiles.whole), RECORDING.set(shape != tiles.whole)

    def note(tokens: int) -> None:
        tiles.divided[shape] = max(tiles.divided.get(shape, 0), tokens)

    def note_own(context: Any, rows: Any, *rest: Any) -> None:
        note(len(rows))

    def sizer(tokens: int, size: TileSize) -> int:
        if size.of(whole) == whole:  # a single tile, in small steps too
            return size.of(tokens)
        tiles.size = size
        note(tokens)
        return tiles.tile(shape)

    leave = _entered(_SIZERS, sizer)
    try:
        with _noted(TiledCrossEntropy, note_own), _noted(TiledHeadLoss, note_own):
            yield
    finally:
        leave()
        RECORDING.reset(token)


@contextmanager
def _noted(function: Any, note: Callable[..., None]) -> Iterator[None]:
    """Call `note` for each run of an autograd function inside the context."""
    forward = function.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        note(*arguments)
        return forward(*arguments, **options)

    function.forward = staticmethod(noted)
    try:
        yield
    finally:
        function.forward = staticmethod(forward)
