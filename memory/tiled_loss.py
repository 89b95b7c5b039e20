"""The loss of a causal language model in tiles of its tokens, with the gradient of the logits in the logits' own place.

transformers' loss holds the logarithms of all probabilities beside the logits, and its backward pass two more tensors
of that size. Here one tile of them at a time is there, made once more in the backward pass. The operators are torch's
own, row by row, so loss and gradients are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import UnsupportedError

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
