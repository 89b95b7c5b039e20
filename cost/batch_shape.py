"""The shape of a batch, on which the memory of a step depends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        """Read the shape: the tensors' first axis holds rows; the second holds tokens if there are just two axes.

        A tensor with one axis tells the rows only where no other does: packed rows have the limits of their texts in
        one.
        """
        tensors = tensors_of(batch)
        most = min(max((tensor.dim() for tensor in tensors), default=0), 2)
        rows = max((tensor.shape[0] for tensor in tensors if tensor.dim() >= max(most, 1)), default=1)
        return cls(rows, max((t.shape[1] for t in tensors if _has_tokens(t, rows)), default=1))

    def joined(self, other: BatchShape) -> BatchShape:
        """The smallest shape that covers both."""
        return BatchShape(max(self.rows, other.rows), max(self.length, other.length))

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"


MASK = "attention_mask"


def _has_tokens(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == rows and not tensor.is_floating_point()


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """The tensors of a batch, in any nesting of mappings and lists."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def map_tensors(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch with each tensor changed, and everything else as it is; mappings become dictionaries."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(item, change) for name, item in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(map_tensors(item, change) for item in batch)
    return batch


def padded(batch: Batch) -> Batch:
    """The same batch with its last token masked, because models skip work if a mask masks nothing."""
    mask = _mask(batch)
    if mask is None or mask.dim() != 2:
        return batch
    mask = mask.clone()
    # Padding is on the left if the first column has any.
    mask[-1, 0 if mask.shape[1] > 1 and not mask[:, 0].all() else -1] = 0
    return {**batch, MASK: mask}


def has_no_padding(batch: Batch) -> bool:
    """Whether a batch has a mask that masks nothing; models may skip work then."""
    mask = _mask(batch)
    return mask is not None and bool(mask.all())


def _mask(batch: Batch) -> torch.Tensor | None:
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) else None


def reshaped(batch: Batch, shape: BatchShape, rows_per_example: int = 1) -> Batch:
    """The batch cut or repeated to a shape.

    A tensor shorter than the longest (labels of an encoder-decoder) changes in proportion. If the batch has padding,
    so does the result.

    Args:
        batch: the batch.
        shape: its rows are a multiple of `rows_per_example`.
        rows_per_example: rows that one example takes, one after the other in blocks: two where a batch holds all
            chosen answers and then all rejected ones. Tensors with a row for each example change alike.
    """
    old = BatchShape.of(batch)
    before, after = old.rows // rows_per_example, shape.rows // rows_per_example

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] not in (old.rows, before):
            return tensor
        has_tokens = _has_tokens(tensor, old.rows)
        blocks = tensor.reshape(-1, before, *tensor.shape[1:])[:, _cycled(after, before, tensor)]
        tensor = blocks.flatten(0, 1)
        if has_tokens:
            length = -(-tensor.shape[1] * shape.length // old.length)
            tensor = tensor[:, _cycled(length, tensor.shape[1], tensor)]
        return tensor

    result = _with_ends(map_tensors(batch, change), batch)
    mask = _mask(batch)
    return result if mask is None or bool(mask.all()) else padded(result)


def _with_ends(result: Batch, batch: Batch) -> Batch:
    """A batch that was cut or made longer, with the last token of each row as often as in the batch before.

    Encoder-decoders that classify look for their end token, and refuse a batch whose rows have different numbers of it.
    """
    whole = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(whole, torch.Tensor) or whole.dim() != 2 or not isinstance(result, Mapping):
        return result
    tokens = result["input_ids"].clone()
    length, before = tokens.shape[1], whole.shape[1]
    rows = _cycled(len(tokens), len(whole), whole)
    mask = _mask(batch)
    if length > before:
        tokens[:, before:] = whole[rows, :1]
    elif length < before and (mask is None or mask.shape == whole.shape):
        real = torch.ones_like(whole) if mask is None else mask
        last = (real * torch.arange(before, device=whole.device)).argmax(dim=1)[rows]
        tokens[:, -1] = torch.where(last >= length, whole[rows, last], tokens[:, -1])
    return {**result, "input_ids": tokens}


def _cycled(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """`count` indices into an axis of this size, starting over at its end."""
    return torch.arange(count, device=like.device) % size
