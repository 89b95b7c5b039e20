"""The loss of a causal language model in tiles of its tokens, with the logits' gradient in the logits' own place.

transformers' loss holds the logarithms of all probabilities beside the logits, and its backward pass two more tensors
of that size. Here one tile of them at a time is there, made once more in the backward pass. The operators are torch's
own, row by row, so loss and gradients are the same bit for bit.

TRL has tiles too: `trl.kernels.chunked_logprob` multiplies the last hidden states with the head in tiles of at most
`TOKEN_CHUNK_SIZE` tokens. A small recorded step would fill one of them in part, and the batch of the run fills several:
a tile would be predicted as large as all of them. So while a small step is recorded, its tiles are as many as those of
the whole batch. Of `tiled_loss` there are always as many tiles, and their tokens are rounded up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import UnsupportedError
from .recording import BatchShape

TILES = 16
"""Into how many tiles the tokens of a batch are divided, whatever its size."""

_REDUCTIONS = {"mean": 1, "sum": 2}


def use_tiled_loss(model: nn.Module) -> None:
    """Let the causal language models in a model that have transformers' own loss compute it in tiles.

    They keep the attribute `_loss_function`, without which they have their own loss again.
    """
    for module in model.modules():
        own = isinstance(module, PreTrainedModel) and "_loss_function" not in vars(module)
        if own and LOSS_MAPPING.get(module.loss_type) is ForCausalLMLoss:
            module.loss_function = tiled_causal_lm_loss


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tiled_causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """The mean loss of the next token, as `transformers.loss.loss_utils.ForCausalLMLoss`; see there for the arguments.

    The backward pass overwrites the logits, unless something else holds them.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    target = shift_labels.view(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss: torch.Tensor = TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.float().view(-1, vocab_size), target, ignore_index, reduction
    )
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class TiledCrossEntropy(torch.autograd.Function):
    """The cross entropy of rows of logits, float32 (tokens, vocabulary), and targets, int64 (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        """The loss, a scalar."""
        place = torch.where(target == ignore_index, 0, target)
        found = logits.new_empty(len(target))
        for tile in _tiles(len(target)):
            picked = _picked(torch.log_softmax(tile.of(logits), 1), tile.of(place))
            tile.of(found).copy_(picked)
        zero = torch.where(target == ignore_index, target, 0)
        # `data` holds the values alone, so that it can be told whether anyone else does.
        ctx.logits, ctx.target, ctx.place, ctx.found = logits.data, target, place, found
        ctx.settings = ignore_index, reduction
        return nn.functional.nll_loss(found[:, None], zero, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of the logits.

        Raises:
            UnsupportedError: the logits are no longer those of the forward pass.
        """
        logits, target, place = ctx.logits, ctx.target, ctx.place
        ignore_index, reduction = ctx.settings
        weight = (target != ignore_index).sum().to(logits.dtype)
        result = logits if _held_once(logits) else torch.empty_like(logits)
        found = torch.empty_like(ctx.found)
        for tile in _tiles(len(target)):
            logarithms = torch.log_softmax(tile.of(logits), 1)
            tile.fresh(tile.of(found)).copy_(tile.fresh(_picked(logarithms, tile.of(place))))
            of_logarithms = torch.ops.aten.nll_loss_backward(
                gradient, logarithms, tile.of(target), None, _REDUCTIONS[reduction], ignore_index, weight
            )
            of_logits = torch.ops.aten._log_softmax_backward_data(of_logarithms, logarithms, 1, logits.dtype)
            tile.fresh(tile.of(result)).copy_(tile.fresh(of_logits))
            del logarithms, of_logarithms, of_logits  # before those of the next tile are made
        if not torch.allclose(found, ctx.found, rtol=0, atol=0, equal_nan=True):
            raise UnsupportedError(
                "The logits were changed between the loss and its backward pass, or the backward pass ran twice; with "
                "`recompute` it needs them as they were, and writes their gradient in their place. Change a copy of "
                "them, or leave `recompute` out."
            )
        return result, None, None, None


def tile_size(tokens: int) -> int:
    """The tokens of a tile of so many tokens. All tiles have as many, so the last ones may overlap."""
    return -(-tokens // TILES)


@dataclass(frozen=True)
class _Tile:
    """A tile: its first row, its rows, and how many of them an earlier tile has had.

    Rows are taken by `narrow`, which is the same operator for any of them, so that steps of any size are alike.
    """

    start: int
    size: int
    done: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the tile."""
        return tensor.narrow(0, self.start, self.size)

    def fresh(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of its rows that no earlier tile has had."""
        return rows.narrow(0, self.done, self.size - self.done)


def _tiles(tokens: int) -> Iterator[_Tile]:
    """All tiles of so many tokens; with few of them, the last have nothing fresh."""
    size = tile_size(tokens)
    for number in range(TILES):
        start = min(number * size, tokens - size)
        yield _Tile(start, size, min(number * size - start, size))


def _picked(logarithms: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return logarithms.gather(1, place[:, None])[:, 0]


def _held_once(tensor: torch.Tensor) -> bool:
    """Whether no other tensor has the same storage; it and the object that asks count."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) <= 2


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
