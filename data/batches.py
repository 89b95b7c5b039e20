"""Batches of a training set: its largest one, and small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..memory.batch_shape import MASK, padded
from ..memory.recording import Batch

Collate = Callable[[list[Any]], Any]


def largest_batch(dataset: Any, collate: Collate, rows: int) -> Batch:
    """The largest batch that training can meet: the longest examples, with padding if any batch may have some.

    Args:
        dataset: map-style or iterable. The lengths of its columns of token ids tell which examples are the longest; the
            first ones are taken where there are no such columns.
        collate: the data loader's function that makes a batch of examples.
        rows: batch size, in examples.

    Raises:
        DataError: the data set is empty.
    """
    names = getattr(dataset, "column_names", None) or ()
    lengths = None
    if not hasattr(dataset, "__len__"):
        chosen = list(islice(iter(dataset), rows))
    else:
        lengths = _lengths(dataset, names)
        order = np.arange(len(dataset)) if lengths is None else np.argsort(-lengths, kind="stable")
        chosen = _rows_at(dataset, order[:rows].tolist())
    if not chosen:
        raise DataError("The training set is empty. Check its path, split and filters.")
    batch = collate([chosen[index % len(chosen)] for index in range(rows)])
    # The longest rows may need no padding while others do. Rows of one length without a mask never need any.
    never = lengths is not None and len(np.unique(lengths)) == 1 and MASK not in names
    return batch if never else padded(batch)


def _lengths(dataset: Any, names: Sequence[str]) -> NDArray[np.int64] | None:
    """Tokens of each example; None if no column holds token ids.

    Of several columns the longest counts, after the prompt's if there is one, as in pairs of answers.
    """
    columns = [name for name in names if name.endswith(("input_ids", "prompt_ids", "chosen_ids", "rejected_ids"))]
    if not columns:
        return None
    lengths = {name: np.array([len(ids) for ids in dataset[name]], dtype=np.int64) for name in columns}
    zeros = np.zeros(len(dataset), dtype=np.int64)
    prompts = [size for name, size in lengths.items() if "prompt" in name]
    answers = [size for name, size in lengths.items() if "prompt" not in name]
    total: NDArray[np.int64] = np.sum([zeros, *prompts], axis=0) + np.max([zeros, *answers], axis=0)
    return total


def small_batches(dataset: Any, collate: Collate, steps: int, rows: int, seed: int) -> Iterator[Batch]:
    """Batches of a few examples, in an order that the seed decides; examples come back where there are too few.

    Args:
        dataset: map-style, or iterable: then its first examples are taken.
        collate: makes a batch of examples.
        steps: number of batches.
        rows: examples in each.
        seed: of the choice.
    """
    if hasattr(dataset, "__len__"):
        order = np.random.default_rng(seed).permutation(len(dataset))
        for indices in np.resize(order, (steps, rows)):
            yield collate(_rows_at(dataset, indices.tolist()))
        return
    examples = list(islice(iter(dataset), steps * rows))
    for first in range(0, steps * rows, rows):
        yield collate(examples[first % len(examples) :][:rows])


def _rows_at(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The rows of a map-style data set at these places."""
    return [dataset[int(index)] for index in indices]
