"""The shape of a batch, and resized batches for recording small steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from .recording import BatchShape

Batch = Any
"""Input of a loss function: usually keyword arguments of the model, in any nesting of mappings and lists."""


def shape_of(batch: Batch) -> BatchShape:
    """Read the shape: the first axis of the tensors holds rows; the second holds tokens if there are just two axes.

    One-axis tensors set the rows only if there are no others: for packed rows they hold the limits of texts. Pictures
    alongside texts have no say: their first axis may hold patches.
    """
    tensors = tensors_of(texts_of(batch))
    most = min(max((tensor.dim() for tensor in tensors), default=0), 2)
    rows = max((tensor.shape[0] for tensor in tensors if tensor.dim() >= max(most, 1)), default=1)
    return BatchShape(rows, max((t.shape[1] for t in tensors if _has_tokens(t, rows)), default=1))


MASK, PLACES = "attention_mask", "position_ids"

PICTURES = ("pixel_", "image_", "video_")
"""Beginnings of the names of tensors that hold pictures, or describe them."""


def texts_of(batch: Batch) -> Batch:
    """Return a batch of texts without its pictures; the batch itself if it has none, or no tokens."""
    texts = isinstance(batch, Mapping) and batch.get("input_ids") is not None
    if not texts or not any(str(name).startswith(PICTURES) for name in batch):
        return batch
    return {name: value for name, value in batch.items() if not str(name).startswith(PICTURES)}


def _pictures_of(batch: Batch) -> list[torch.Tensor]:
    """Return the tensors of a batch of texts that hold pictures, or describe them."""
    texts = texts_of(batch)
    return [] if texts is batch else tensors_of([value for name, value in batch.items() if name not in texts])


def picture_values(batch: Batch) -> int:
    """Return the number of values in the pictures of a batch of texts; 0 without pictures."""
    return sum(tensor.numel() for tensor in _pictures_of(batch))


def follows_rows(batch: Batch) -> bool:
    """True unless a batch of texts has pictures whose first axis holds no rows, so that it must run whole."""
    rows = shape_of(batch).rows
    return all(tensor.shape[0] == rows for tensor in _pictures_of(batch) if tensor.dim())


LIMITS, LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
"""Boundaries of texts in an unpadded row, int32 (texts + 1,), and the length of the longest text."""


def _has_tokens(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == rows and not tensor.is_floating_point()


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Return the tensors of a batch, in any nesting of mappings and lists."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def like(batch: Mapping[str, Any], entries: dict[str, Any]) -> Batch:
    """Build a mapping of the batch's type, as `Trainer._prepare_input` does; a dictionary if that fails."""
    with suppress(TypeError):
        return type(batch)(entries)  # type: ignore[call-arg]
    return entries


def map_tensors(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """Apply a function to each tensor of a batch, leaving the rest unchanged; mappings keep their type."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return like(batch, {name: map_tensors(item, change) for name, item in batch.items()})
    if type(batch) in (list, tuple):
        return type(batch)(map_tensors(item, change) for item in batch)
    return batch


def padded(batch: Batch) -> Batch:
    """Mask the last token of a batch, because models skip work if a mask masks nothing.

    Parts with a mask of their own are masked too, such as the "chosen_attention_mask" of preference pairs.
    """
    masks = {name: mask.clone() for name, mask in _masks(batch).items() if mask.dim() == 2}
    for mask in masks.values():  # padding is on the left if the first column has any
        mask[-1, 0 if mask.shape[1] > 1 and not mask[:, 0].all() else -1] = 0
    return like(batch, {**batch, **masks}) if masks else batch


def in_texts(batch: Batch) -> Batch:
    """Make the last token of a batch a text of its own, because models skip work if each row is one text."""
    if not _tells_places(batch) or _holds_texts(batch):
        return batch
    places = batch[PLACES].clone()
    places[-1, -1] = 0
    return like(batch, {**batch, PLACES: places})


def _tells_places(batch: Batch) -> bool:
    places = batch.get(PLACES) if isinstance(batch, Mapping) else None
    return isinstance(places, torch.Tensor) and places.dim() == 2 and places.shape[1] > 1


def _holds_texts(batch: Batch) -> bool:
    """True if a row holds several texts, so that positions restart."""
    return _tells_places(batch) and bool((batch[PLACES].diff() != 1).any())


def has_no_padding(batch: Batch) -> bool:
    """True if a batch has a mask that masks nothing; models may skip work then."""
    masks = _masks(batch)
    return bool(masks) and all(bool(mask.all()) for mask in masks.values())


def _masks(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the masks of a batch by name."""
    named = batch.items() if isinstance(batch, Mapping) else ()
    return {name: part for name, part in named if str(name).endswith(MASK) and isinstance(part, torch.Tensor)}


def reshaped(batch: Batch, shape: BatchShape, rows_per_example: int = 1) -> Batch:
    """Cut or repeat a batch to a shape.

    Tensors shorter than the longest (labels of an encoder-decoder) change in proportion. Padding and rows with several
    texts are preserved. Pictures alongside texts change with the rows if their first axis holds them.

    Args:
        batch: the batch.
        shape: target shape; its rows are a multiple of `rows_per_example`.
        rows_per_example: rows per example, arranged in consecutive blocks: two if a batch holds all chosen answers and
            then all rejected ones. Tensors with one row per example change alike.
    """
    old = shape_of(batch)
    before, after = old.rows // rows_per_example, shape.rows // rows_per_example

    texts = texts_of(batch)

    def change(tensor: torch.Tensor, *, is_text: bool = True) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] not in (old.rows, before):
            return tensor
        has_tokens = is_text and _has_tokens(tensor, old.rows)
        blocks = tensor.reshape(-1, before, *tensor.shape[1:])[:, _cycled(after, before, tensor)]
        tensor = blocks.flatten(0, 1)
        if has_tokens:
            length = -(-tensor.shape[1] * shape.length // old.length)
            tensor = tensor[:, _cycled(length, tensor.shape[1], tensor)]
        return tensor

    result = map_tensors(texts, change)
    if texts is not batch:
        result = like(batch, {**map_tensors(batch, partial(change, is_text=False)), **result})
    result = _with_ends(result, batch)
    result = _with_limits(result, shape.rows * shape.length, old.rows * old.length)
    result = in_texts(result) if _holds_texts(batch) else result
    return result if all(bool(mask.all()) for mask in _masks(batch).values()) else padded(result)


def _with_limits(result: Batch, tokens: int, before: int) -> Batch:
    """Rescale the text limits of a packed batch from `before` tokens to `tokens`.

    Flash attention reads up to the last limit unchecked, so all limits scale alike, and the number of texts stays.
    """
    if not isinstance(result, Mapping):
        return result
    moved = {name: (result[name].long() * tokens // before).int() for name in LIMITS if result.get(name) is not None}
    longest = {name: -(-result[name] * tokens // before) for name in LONGEST if result.get(name) is not None}
    return like(result, {**result, **moved, **longest})


def _with_ends(result: Batch, batch: Batch) -> Batch:
    """Restore the count of each row's last token in a resized batch.

    Encoder-decoder classifiers look up their end token, and refuse batches whose rows contain different numbers of it.
    """
    whole = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(whole, torch.Tensor) or whole.dim() != 2 or not isinstance(result, Mapping):
        return result
    tokens = result["input_ids"].clone()
    length, before = tokens.shape[1], whole.shape[1]
    rows = _cycled(len(tokens), len(whole), whole)
    mask = _masks(batch).get(MASK)
    if length > before:
        tokens[:, before:] = whole[rows, :1]
    elif length < before and (mask is None or mask.shape == whole.shape):
        real = torch.ones_like(whole) if mask is None else mask
        last = (real * torch.arange(before, device=whole.device)).argmax(dim=1)[rows]
        tokens[:, -1] = torch.where(last >= length, whole[rows, last], tokens[:, -1])
    return like(result, {**result, "input_ids": tokens})


def _cycled(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Return `count` indices into an axis of this size, wrapping around."""
    return torch.arange(count, device=like.device) % size
