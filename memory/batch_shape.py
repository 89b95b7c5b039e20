"""The shape of a batch, on which the memory of a step depends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .recording import Batch


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch.

    Attributes:
        rows: number of examples.
        length: tokens of each example, padding included; 1 if the batch has no axis of tokens.
    """

    rows: int
    length: int

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """Read the shape: the tensors' first axis holds rows; the second holds tokens if there are just two axes."""
        rows = max((tensor.shape[0] for tensor in batch.values() if tensor.dim()), default=1)
        return cls(rows, max((t.shape[1] for t in batch.values() if _has_tokens(t, rows)), default=1))

    def joined(self, other: BatchShape) -> BatchShape:
        """The smallest shape that covers both."""
        return BatchShape(max(self.rows, other.rows), max(self.length, other.length))

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"


def _has_tokens(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == rows and not tensor.is_floating_point()


MASK = "attention_mask"


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The same batch with its last token masked, because models skip work if a mask masks nothing."""
    result = dict(batch)
    if MASK in batch and batch[MASK].dim() == 2:
        mask = batch[MASK].clone()
        # Padding is on the left if the first column has any.
        mask[-1, 0 if mask.shape[1] > 1 and not mask[:, 0].all() else -1] = 0
        result[MASK] = mask
    return result


def reshaped(batch: Batch, shape: BatchShape) -> dict[str, torch.Tensor]:
    """The batch cut or repeated to a shape.

    A tensor shorter than the longest (labels of an encoder-decoder) changes in proportion. If the batch has padding,
    so does the result.
    """
    old = BatchShape.of(batch)
    result = {}
    for name, tensor in batch.items():
        if tensor.dim() and tensor.shape[0] == old.rows:
            has_tokens = _has_tokens(tensor, old.rows)
            tensor = tensor[_cycled(shape.rows, old.rows, tensor)]
            if has_tokens:
                length = -(-tensor.shape[1] * shape.length // old.length)
                tensor = tensor[:, _cycled(length, tensor.shape[1], tensor)]
        result[name] = tensor
    if MASK in batch and not bool(batch[MASK].all()):
        result = padded(result)
    return result


def _cycled(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """`count` indices into an axis of this size, starting over at its end."""
    return torch.arange(count, device=like.device) % size
