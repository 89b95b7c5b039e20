"""Batches of a training set: its largest one, as tensors on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..memory.batch_shape import MASK, padded
from ..memory.recording import Batch

Collate = Callable[[list[Any]], Any]


def rows_at(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The rows of a map-style data set at these places."""
    return [dataset[int(index)] for index in indices]


def largest_batch(dataset: Any, collate: Collate, rows: int, device: torch.device) -> Batch:
    """The largest batch that training can meet: the longest examples, with padding if any batch may have some.

    Args:
        dataset: map-style or iterable. The length of `input_ids` tells which examples are the longest; the first ones
            are taken where there is no such column.
        collate: the data loader's function that makes a batch of examples.
        rows: batch size.
        device: the model's device.

    Raises:
        DataError: the data set is empty, or the collator returns no tensors by name.
    """
    names = getattr(dataset, "column_names", None) or ()
    lengths: list[int] = []
    if not hasattr(dataset, "__len__"):
        chosen = list(islice(iter(dataset), rows))
    else:
        lengths = [len(ids) for ids in dataset["input_ids"]] if "input_ids" in names else []
        order = np.argsort(-np.asarray(lengths), kind="stable") if lengths else np.arange(len(dataset))
        chosen = rows_at(dataset, order[:rows].tolist())
    if not chosen:
        raise DataError("The training set is empty. Check its path, split and filters.")
    chosen = [chosen[index % len(chosen)] for index in range(rows)]
    batch = to_batch(collate(chosen), device)
    # The longest rows may need no padding while others do. Rows of one length without a mask never need any.
    never = len(set(lengths)) == 1 and MASK not in names
    return batch if never else padded(batch)


def to_batch(collated: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a collated batch, on the device; DataError if there are none."""
    items = collated.items() if hasattr(collated, "items") else ()
    batch = {name: value.to(device) for name, value in items if isinstance(value, torch.Tensor)}
    if not batch:
        raise DataError(f"The data collator returned {type(collated).__name__} without tensors by name.")
    return batch
