"""Batches of a training set: its largest one, and small ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import getclosurevars, isfunction
from io import IOBase
from itertools import count, cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..common.errors import DataError
from ..cost.batch_shape import MASK, PLACES, Batch, in_texts, padded, shape_of

_EMPTY = "The training set is empty. Check its path, split and filters."

Collate = Callable[[list[Any]], Any]

MOST_EXAMPLES = 10_000
"""Maximum examples inspected in a data set without columns."""

MOST_TO_THE_END = 100
"""Maximum rows read from a stream to check if it restarts at its end."""

_END: Any = object()

IGNORED = -100
"""Label of a token ignored by the loss, as in torch and transformers."""


def largest_batch(dataset: Any, collate: Collate, rows: int) -> Batch:
    """Build the largest batch of a training run: the longest examples, with padding if any batch may have some.

    Args:
        dataset: map-style or iterable. The longest examples are found by the lengths of token ids: in the columns of a
            `datasets.Dataset`; in up to `MOST_EXAMPLES` evenly spaced examples if a transform makes them, or for any
            other map-style data set of mappings. Without token ids, the first examples are used.
        collate: the data loader's collate function.
        rows: batch size, in examples.

    Raises:
        DataError: the data set is empty, or can be iterated only once.
    """
    lengths, names = None, list[str]()
    if not hasattr(dataset, "__len__"):
        _check_repeats(dataset)
        examples = list(islice(iter(dataset), rows))
    else:
        places, lengths, names = _lengths(dataset)
        order = np.arange(len(places)) if lengths is None else _longest_first(lengths)
        examples = _rows_at(dataset, places[order[:rows]].tolist())
    if not examples:
        raise DataError(_EMPTY)
    batch = collate([examples[index % len(examples)] for index in range(rows)])
    # The longest rows may need no padding while others do. Rows of equal length without a mask never need any.
    alike = lengths is not None and lengths.shape[1] == len(dataset) and len(np.unique(lengths)) == 1
    never = alike and MASK not in names
    batch = batch if never else padded(batch)
    first = examples[0]
    packed = isinstance(first, Mapping) and not {PLACES, "seq_lengths"}.isdisjoint(first)
    return in_texts(batch) if packed else batch  # the longest rows may hold one text each, and others several


def _check_repeats(dataset: Any) -> None:
    """Raise DataError if a data set can be iterated only once: the examples inspected here would be lost."""
    if iter(dataset) is iter(dataset) or _is_used_up(dataset):
        once = f"The data set ({type(dataset).__name__}) can be read only once"
        lost = "rankpilot inspects some rows before the run, which would be lost"
        advice = "Make `__iter__` restart each time, as datasets.IterableDataset does."
        raise DataError(f"{once}, and {lost}. {advice}")


def _is_used_up(dataset: Any) -> bool:
    """True if reading some rows of a stream removes them from later iterations.

    It does not if two iterations begin alike. Otherwise the stream may be shuffled: iterations share their rows if
    these come from an iterator held by the data set, or if a new iteration is empty once another has reached the end.
    """
    held = _held_iterators(dataset)
    first, again = list(islice(iter(dataset), 2)), iter(dataset)
    if _alike(first, list(islice(again, 2))):
        return False
    if held & _held_iterators(dataset):
        return True
    more = sum(1 for _ in islice(again, MOST_TO_THE_END))
    return more < MOST_TO_THE_END and next(iter(dataset), _END) is _END


def _held_iterators(dataset: Any) -> set[int]:
    """Iterators held by a data set, or read by its `__iter__` from outside, by their `id`.

    Excludes endless ones, since an epoch counter is not a source of rows, and files, which may be reopened.
    """
    held = list(getattr(dataset, "__dict__", {}).values())
    if isfunction(function := getattr(type(dataset), "__iter__", None)):
        outside = getclosurevars(function)
        held += [*outside.nonlocals.values(), *outside.globals.values()]
    return {id(each) for each in held if isinstance(each, Iterator) and not isinstance(each, count | cycle | IOBase)}


def _alike(one: Any, other: Any) -> bool:
    """True if two examples are equal; False if they cannot be compared."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor | np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # comparison gives several values, as for a record of tensors
        return False


def first_example(dataset: Any) -> Any:
    """Return the first example of a data set; DataError if it is empty, or can be iterated only once."""
    if not hasattr(dataset, "__len__"):
        _check_repeats(dataset)
    for example in dataset if not hasattr(dataset, "__len__") else _rows_at(dataset, range(min(1, len(dataset)))):
        return example
    raise DataError(_EMPTY)


def unknown_lengths(dataset: Any) -> str:
    """Return a sentence for an error, after a space, if the longest rows of a data set cannot be found, else "".

    Args:
        dataset: map-style or iterable.
    """
    if hasattr(dataset, "__len__") and _holds_token_ids(dataset):
        return ""
    advice = "put the longest first, or pass a budget in bytes"
    return f" For a data set without a length or without token ids, only the first rows are known beforehand: {advice}."


def _holds_token_ids(dataset: Any) -> bool:
    """True if a map-style data set has columns of token ids, or a first row with some."""
    if _of_token_ids(getattr(dataset, "column_names", None) or ()):
        return True
    first = _rows_at(dataset, range(min(1, len(dataset))))
    return any(isinstance(example, Mapping) and bool(_of_token_ids(example)) for example in first)


_PROMPT, _ANSWERS = "prompt_ids", ("chosen_ids", "rejected_ids", "completion_ids", "reference_ids")
"""Suffixes of TRL's columns for a prompt, and for the answers its collators append to it."""


def _of_token_ids(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(("input_ids", _PROMPT, *_ANSWERS))]


def _longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of examples, longest first; the longest of each text come before all others, int64 (examples,).

    Args:
        lengths: tokens of the texts of each example, int64 (texts, examples).
    """
    longest = lengths.max(axis=0)
    of_a_text = np.isin(np.arange(len(longest)), lengths.argmax(axis=1))
    return np.lexsort((-longest, ~of_a_text))


def _lengths(dataset: Any) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, list[str]]:
    """Indices of examples, tokens of their texts, and column names; no lengths without token ids.

    A text is a column of input ids, or the prompt with one of its answers: int64 (texts, examples). A collator, such as
    KTO's, may pad each to its own length.
    """
    places = np.arange(len(dataset))
    names = list(getattr(dataset, "column_names", None) or ())
    if not _holds_token_ids(dataset):
        return places, None, names
    if _of_token_ids(names):
        table = dataset
    else:
        places = places[:: -(-len(dataset) // MOST_EXAMPLES) or 1]
        examples = _rows_at(dataset, places.tolist())
        mappings = bool(examples) and all(isinstance(example, Mapping) for example in examples)
        names = sorted(set.intersection(*(set(example) for example in examples))) if mappings else []
        table = {name: [example[name] for example in examples] for name in names}
    columns = _of_token_ids(names)
    if not columns:
        return places, None, names
    if len(places) and "labels" in names and np.ndim(table["labels"][0]) == 1:
        columns.append("labels")  # possibly read by a decoder
    lengths = {name: np.array([len(ids) for ids in table[name]], dtype=np.int64) for name in columns}
    prompts = (size for name, size in lengths.items() if name.endswith(_PROMPT))
    prompt: NDArray[np.int64] = sum(prompts, np.zeros(len(places), dtype=np.int64))
    after = [prompt + size for name, size in lengths.items() if name.endswith(_ANSWERS)]
    whole = [size for name, size in lengths.items() if not name.endswith((_PROMPT, *_ANSWERS))]
    return places, np.array([*after, *whole] or [prompt]), names


def small_batches(dataset: Any, collate: Collate, steps: int, rows: int, seed: int) -> Iterator[Batch]:
    """Yield batches of a few examples, in a seeded order; examples repeat if there are too few.

    Args:
        dataset: map-style, or iterable: then its first examples are used.
        collate: the collate function.
        steps: number of batches.
        rows: examples per batch.
        seed: seed of the order.
    """
    if hasattr(dataset, "__len__"):
        order = np.random.default_rng(seed).permutation(len(dataset))
        for indices in np.resize(order, (steps, rows)):
            yield collate(_rows_at(dataset, indices.tolist()))
        return
    examples = list(islice(iter(dataset), steps * rows))
    for first in range(0, steps * rows, rows):
        yield collate(examples[first % len(examples) :][:rows])


def count_predictions(batch: Batch) -> tuple[int, int]:
    """Number of predictions counted in a batch's loss, and its number of tokens without padding.

    Labels with a token axis mark the counted ones; other labels are one prediction per row. Without labels, as in
    preference training, every token counts as predicted.

    Args:
        batch: output of the collator.
    """
    shape, named = shape_of(batch), batch if isinstance(batch, Mapping) else {}
    mask, labels = (named.get(name) for name in (MASK, "labels"))
    tokens = int((mask != 0).sum()) if isinstance(mask, Tensor) and mask.dim() == 2 else shape.rows * shape.length
    if not isinstance(labels, Tensor):
        return tokens, tokens
    if labels.dim() < 2 or labels.is_floating_point():
        return min(shape.rows, tokens), tokens
    return min(int((labels != IGNORED).sum()), tokens), tokens


def predicted_share(counts: Sequence[tuple[int, int]]) -> float:
    """Share of tokens counted in the loss over some batches, above 0.

    Args:
        counts: of each batch, see `count_predictions`.
    """
    predictions, tokens = (sum(count[place] for count in counts) for place in range(2))
    return max(predictions, 1) / max(tokens, 1)


def _rows_at(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Rows of a map-style data set at these indices."""
    return [dataset[int(index)] for index in indices]
