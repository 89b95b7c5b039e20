"""The shape of a batch: what its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .recording import Batch


@dataclass(frozen=True)
class BatchShape:
    """Of a batch.

    Attributes:
        rows: examples.
        length: tokens of each, padding included; 1 where there is no such axis.
    """

    rows: int
    length: int

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """Read from the tensors: rows are their first axis, tokens the second of those with two axes."""
        rows = max((tensor.shape[0] for tensor in batch.values() if tensor.dim()), default=1)
        return cls(rows, max((t.shape[1] for t in batch.values() if _has_tokens(t, rows)), default=1))

    def covers(self, other: BatchShape) -> bool:
        """Whether no axis of the other is larger."""
        return self.rows >= other.rows and self.length >= other.length

    def joined(self, other: BatchShape) -> BatchShape:
        """The smallest shape that covers both."""
        return BatchShape(max(self.rows, other.rows), max(self.length, other.length))

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"


def _has_tokens(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == rows and not tensor.is_floating_point()


MASK = "attention_mask"


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The same batch with its last token masked: models skip work on masks that mask nothing."""
    result = dict(batch)
    if MASK in batch and batch[MASK].dim() == 2:
        mask = batch[MASK].clone()
        # Padding is on the left where the first column has any.
        mask[-1, 0 if mask.shape[1] > 1 and not mask[:, 0].all() else -1] = 0
        result[MASK] = mask
    return result


def reshaped(batch: Batch, shape: BatchShape) -> dict[str, torch.Tensor]:
    """A batch of this shape: rows and tokens are left out, or repeated.

    A tensor of another length than the longest (labels of an encoder-decoder) changes in proportion. Where the batch
    has padding, so has the result.
    """
    given = BatchShape.of(batch)
    result = {}
    for name, tensor in batch.items():
        if tensor.dim() and tensor.shape[0] == given.rows:
            has_tokens = _has_tokens(tensor, given.rows)
            tensor = tensor[_cycled(shape.rows, given.rows, tensor)]
            if has_tokens:
                length = -(-tensor.shape[1] * shape.length // given.length)
                tensor = tensor[:, _cycled(length, tensor.shape[1], tensor)]
        result[name] = tensor
    if MASK in batch and not bool(batch[MASK].all()):
        result = padded(result)
    return result


def _cycled(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """So many indices into an axis, from its start again where it ends."""
    return torch.arange(count, device=like.device) % size
