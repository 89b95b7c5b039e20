"""The rows of a batch: their lengths without padding, and sub-batches of some of them.

An axis holds tokens only if its size varies with the length of the text: 16 features are not tokens, even in a batch of
texts with 16 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...common.arrays import BoolArray, IntArray
from ...common.errors import UnsupportedError
from ...cost.batch_shape import LIMITS, LONGEST, MASK, PICTURES, PLACES, Batch, like, shape_of
from ...cost.recording import BatchShape
from ...data.batches import IGNORED


@dataclass(frozen=True)
class Cuts:
    """Axes of a run's batches that may be cut.

    Attributes:
        groups: names of the tensors with tokens on their second axis, grouped by equal sizes.
        left: True if padding on the left may be cut, in addition to the right.
    """

    groups: tuple[frozenset[str], ...]
    left: bool = False

    @classmethod
    def seen_in(cls, batches: Iterable[Batch], *, left: bool) -> Cuts:
        """Infer the axes from a few batches of one example each; an axis of constant size is recognized by name.

        Args:
            batches: batches of different examples.
            left: see above.
        """
        sizes: dict[str, list[int]] = {}
        looked, odd = list(batches), set[str]()
        for batch in looked:
            for name, value in _named(batch):
                if isinstance(value, torch.Tensor) and value.dim() >= 2:
                    sizes.setdefault(name, []).append(value.shape[1])
                    odd |= {name} if value.is_floating_point() and value.dim() == 2 else set()
        groups: dict[tuple[int, ...], set[str]] = {}
        for name, each in sizes.items():
            by_name = name.endswith(_TOKENS) and name not in odd
            if len(each) == len(looked) and (len(set(each)) > 1 or by_name):
                groups.setdefault(tuple(each), set()).add(name)
        if any(len(set(each)) > 1 for each in groups):  # then a constant axis holds none
            groups = {each: names for each, names in groups.items() if len(set(each)) > 1}
        return cls(tuple(map(frozenset, groups.values())), left)


_TOKENS = (
    "input_ids",
    "labels",
    MASK,
    "token_type_ids",
    PLACES,
    "inputs_embeds",
    "completion_mask",
    "special_tokens_mask",
    "assistant_masks",
)
"""Suffixes of the names of tensors with one value per token."""


@dataclass(frozen=True)
class _Axis:
    """The tokens of a group of tensors.

    Attributes:
        size: tokens, padding included.
        first: index of each row's first token other than padding, int64 (rows,).
        end: index after its last one, int64 (rows,); a row without tokens is all padding.
    """

    size: int
    first: IntArray
    end: IntArray

    @classmethod
    def of(cls, size: int, real: BoolArray, *, left: bool, without: int) -> _Axis:
        """Build from a mask of the real tokens, bool (rows, tokens); padding on the `left` counts if it may be cut.

        A row of nothing but padding gets `without` tokens.
        """
        some = real.any(axis=1)
        first = np.where(some & left, real.argmax(axis=1), 0)
        return cls(size, first, np.where(some, size - real[:, ::-1].argmax(axis=1), without))

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row after cutting padding on one side, the same for all rows, int64 (rows,)."""
        right, left = self.end - self.first.min(), self.end.max() - self.first
        lengths: IntArray = right if right.sum() <= left.sum() else left
        return lengths

    def cut(self, rows: IntArray, multiple: int) -> slice:
        """Return the tokens of some rows without their common padding, rounded up to a multiple if possible."""
        first, end = int(self.first[rows].min()), int(self.end[rows].max())
        missing = -(end - first) % multiple
        after = min(missing, self.size - end)
        return slice(max(first - (missing - after), 0), end + after)


@dataclass(frozen=True)
class BatchRows:
    """A batch with separable examples.

    Attributes:
        batch: the batch.
        shape: its shape, padding included.
        examples: number of examples.
        lengths: tokens of each example without padding that can be cut, int64 (examples,); those of the longest row if
            an example has several. 1 if the batch has no axis of tokens.
        each: rows of an example, one in each block of the batch.
        packed: True if examples are texts concatenated in one row, separated by their positions.
        predicted: predictions of each example counted by the loss, with and without a first token, int64 (2, examples);
            None without labels of tokens.
    """

    batch: Batch
    shape: BatchShape
    examples: int
    lengths: IntArray
    each: int
    predicted: IntArray | None
    _axes: Mapping[frozenset[str], _Axis]
    packed: bool = False

    @classmethod
    def of(cls, batch: Batch, cuts: Cuts, each: int = 1) -> BatchRows:
        """Separate the examples of a batch.

        Args:
            batch: a batch with one tensor or list entry per row, in any nesting.
            cuts: the axes that may be cut.
            each: rows of an example; see `reshaped`.

        Raises:
            UnsupportedError: an entry belongs to no row.
        """
        texts = [value for name, value in _named(batch) if name.endswith((*_TEXTS, MASK))]
        reads = any(name.endswith("input_ids") for name, _ in _named(batch))
        shape = shape_of(texts or batch)
        if each == 1 and (starts := _starts_of_texts(batch)) is not None:
            lengths = np.diff(starts, append=shape.length)
            return cls(batch, shape, len(starts), lengths, 1, _predicted_in_texts(batch, starts), {}, packed=True)
        examples = max(shape.rows // each, 1)
        axes: dict[frozenset[str], _Axis] = {}
        if examples > 1 or each == 1:
            for name, value in _named(batch):
                _check_rows(name, value, shape.rows, examples, texts=reads)
            axes = _axes_of(batch, cuts, shape.rows)
        lengths = np.full(examples, shape.length)
        if any(axis.size == shape.length for axis in axes.values()):
            tokens = [-(-axis.lengths * shape.length // axis.size) for axis in axes.values()]
            lengths = _of_examples(np.max(tokens, axis=0), each).max(axis=0)
        return cls(batch, shape, examples, lengths, each, _predicted(batch, shape.rows, each), axes)

    def part(self, examples: Sequence[int], multiple: int = 1) -> Batch:
        """Return the batch of some examples, without their common padding.

        Args:
            examples: their indices, ascending.
            multiple: round the tokens of a row up to this multiple, if there is padding.
        """
        chosen = np.asarray(examples)
        if self.packed:
            return self.batch if len(chosen) == self.examples else self._texts(chosen)
        rows = np.concatenate([block * self.examples + chosen for block in range(self.each)])
        cuts = {name: axis.cut(rows, multiple) for names, axis in self._axes.items() for name in names}
        whole = len(chosen) == self.examples
        if whole and all(cuts[min(names)] == slice(0, axis.size) for names, axis in self._axes.items()):
            return self.batch

        def change(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self._cut(value, chosen, rows, cuts.get(name))
            places = {self.shape.rows: rows, self.examples: chosen}.get(len(value))
            return value if places is None or whole else type(value)(value[place] for place in places.tolist())

        return _changed(self.batch, change)

    def with_labels(self, labels: torch.Tensor, cuts: Cuts) -> BatchRows:
        """Return the same rows with other labels."""
        return BatchRows.of(like(self.batch, {**self.batch, "labels": labels}), cuts, self.each)

    def _texts(self, chosen: IntArray) -> Batch:
        """Concatenate some texts of a packed row, with limits of texts if the batch has any."""
        lengths, ends = self.lengths[chosen], self.lengths.cumsum()
        places = torch.cat([torch.arange(ends[text] - self.lengths[text], ends[text]) for text in chosen])
        limits = np.append(0, lengths.cumsum())

        def change(name: str, value: Any) -> Any:
            if name in LONGEST and value is not None:
                return int(lengths.max())
            if not isinstance(value, torch.Tensor):
                return value
            return value.new_tensor(limits) if name in LIMITS else value[:, places.to(value.device)]

        return like(self.batch, {name: change(name, value) for name, value in self.batch.items()})

    def of_example(self, tensor: torch.Tensor, example: int) -> torch.Tensor:
        """Return a view of an example in a tensor of tokens; its first row if it has several."""
        if not self.packed:
            return tensor[example]
        end = int(self.lengths[: example + 1].sum())
        return tensor[0, end - int(self.lengths[example]) : end]

    def span(self, examples: Sequence[int]) -> slice:
        """Return the token range in the batch of a part of these examples."""
        axis = next((axis for axis in self._axes.values() if axis.size == self.shape.length), None)
        return slice(0, self.shape.length) if axis is None else axis.cut(np.asarray(examples), 1)

    def _cut(self, tensor: torch.Tensor, chosen: IntArray, rows: IntArray, cut: slice | None) -> torch.Tensor:
        if tensor.dim() and tensor.shape[0] in (self.shape.rows, self.examples) and len(chosen) < self.examples:
            places = rows if tensor.shape[0] == self.shape.rows else chosen
            tensor = tensor[torch.as_tensor(places, device=tensor.device)]
        if cut is None or tensor.dim() < 2:
            return tensor
        return tensor[:, cut].contiguous()  # losses take views of labels

    def named(self) -> Iterator[tuple[str, Any]]:
        """Yield the tensors and lists of the batch with their names."""
        yield from _named(self.batch)

    @property
    def tokens(self) -> int:
        """Tokens of the batch, padding included; one row per example."""
        return (1 if self.packed else self.examples) * self.shape.length

    @property
    def token_bytes(self) -> float:
        """Bytes of a batch per token: a part is a separate copy."""
        tensors = (value for _, value in _named(self.batch) if isinstance(value, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors) / max(self.tokens, 1)

    def shares(self, parts: Sequence[Sequence[int]], kind: str) -> list[float]:
        """Return the factor of each part's loss, so that they add up to the batch's.

        Args:
            parts: the indices of their examples.
            kind: one of `SHARES`.
        """
        if kind == SUM:
            return [1.0] * len(parts)
        counts: Any = np.ones(self.examples)
        if kind != ROWS and self.predicted is not None:
            counts = self.predicted[int(kind == NEXT_TOKENS)]
        total = counts.sum()
        return [float(counts[list(part)].sum() / total) if total else 0.0 for part in parts]


_TEXTS = ("input_ids", "labels")
"""Tensors that, along with masks, define the rows of a batch if present: pictures may be split into pieces."""

SUM, ROWS, TOKENS, NEXT_TOKENS = SHARES = ("sum", "mean over rows", "mean over tokens", "mean over next tokens")
"""Ways a loss combines its rows: sum, or mean over rows, predictions, or predictions after a first token."""


def _named(batch: Batch, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and lists of a batch with their names; those in nested mappings have dotted names."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _named(value, f"{name}.{key}" if name else str(key))
    elif isinstance(batch, torch.Tensor) or (isinstance(batch, list | tuple) and not _holds_tensors(batch)):
        yield name, batch
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _named(value, name)


def _holds_tensors(values: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor | Mapping | list | tuple) for value in values)


def _changed(batch: Batch, change: Callable[[str, Any], Any], name: str = "") -> Batch:
    """Return the batch with each of its tensors and lists changed, given their names as in `_named`."""
    if isinstance(batch, Mapping):
        items = {key: _changed(value, change, f"{name}.{key}" if name else str(key)) for key, value in batch.items()}
        return like(batch, items)
    if isinstance(batch, torch.Tensor) or (isinstance(batch, list | tuple) and not _holds_tensors(batch)):
        return change(name, batch)
    return type(batch)(_changed(value, change, name) for value in batch) if isinstance(batch, list | tuple) else batch


def _check_rows(name: str, value: Any, rows: int, examples: int, *, texts: bool) -> None:
    """Raise UnsupportedError if a value has entries, but not one for each row."""
    if name.startswith(PICTURES) and texts:
        raise UnsupportedError(f"{name} contains images, of which a row may have several")
    if name in (*LIMITS, *LONGEST):
        raise UnsupportedError(f"{name} marks where texts in a shared row end")
    size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None
    if isinstance(value, torch.Tensor) and size not in (None, rows, examples, 1):
        raise UnsupportedError(f"{name or 'a tensor'} has {size} entries, but the batch has {rows} rows")
    if isinstance(value, list | tuple) and value and len(value) not in (rows, examples):
        raise UnsupportedError(f"{name or 'a list'} has {len(value)} entries, but the batch has {rows} rows")


def _starts_of_texts(batch: Batch) -> IntArray | None:
    """Return the starts of a packed batch's texts, int64 (texts,): one row, whose positions restart at each text.

    None if there is no such row, or if an entry belongs to no token.
    """
    places = batch.get(PLACES) if isinstance(batch, Mapping) else None
    if not isinstance(places, torch.Tensor) or places.dim() != 2 or len(places) != 1:
        return None
    for name, value in batch.items():
        whole = isinstance(value, torch.Tensor) and value.shape == places.shape
        if value is not None and name not in (*LIMITS, *LONGEST) and not whole:
            return None
    starts = np.flatnonzero(np.diff(places[0].cpu().numpy(), prepend=-2) != 1)
    return starts if len(starts) > 1 else None


def longest_text(batch: Batch) -> int | None:
    """Return the tokens of a packed batch's longest text, plus one that `in_texts` may have cut; else None."""
    starts, length = _starts_of_texts(batch), shape_of(batch).length
    return None if starts is None else min(int(np.diff(starts, append=length).max()) + 1, length)


def _predicted_in_texts(batch: Batch, starts: IntArray) -> IntArray | None:
    """Return `BatchRows.predicted` of packed texts."""
    if batch.get("labels") is None:
        return None
    counted = (batch["labels"][0] != IGNORED).cpu().numpy().astype(np.int64)
    sums = np.add.reduceat(counted, starts)
    return np.array([sums, sums - counted[starts]])


def _axes_of(batch: Batch, cuts: Cuts, rows: int) -> dict[frozenset[str], _Axis]:
    """Return the token axes of a batch by group; without any mask or labels, no padding is known.

    A mask marks the padding of tensors of its group, as do labels ignored by every loss; a token with a counted label
    is not padding. For inputs without a mask, all tokens are read.
    """
    named = [(name, value) for name, value in _named(batch) if isinstance(value, torch.Tensor)]
    square = {value.shape[-1] for _, value in named if value.dim() == 4 and value.shape[-1] == value.shape[-2]}
    axes: dict[frozenset[str], _Axis] = {}
    for group in cuts.groups:
        own = [(name, value) for name, value in named if name in group and value.dim() >= 2]
        sizes = {value.shape[1] for _, value in own}
        if len(sizes) != 1 or any(len(value) not in (rows, 1) for _, value in own):
            continue
        (size,) = sizes
        flat = [(name, value) for name, value in own if value.dim() == 2]
        masks = [value for name, value in flat if name.endswith(MASK)]
        labels = [value for name, value in flat if name.endswith("labels") and not value.is_floating_point()]
        reads = any(name.endswith("input_ids") and "decoder_" not in name for name, _ in flat)
        if size in square or (reads and not masks) or not (masks or labels):
            axes[group] = _Axis(size, np.zeros(rows, dtype=np.int64), np.full(rows, size))
            continue
        real = np.zeros((rows, size), dtype=np.bool_)
        for value in masks:
            real |= np.resize((value != 0).cpu().numpy(), real.shape)
        for value in labels:
            real |= np.resize((value != IGNORED).cpu().numpy(), real.shape)
        # A fully masked query may attend to all tokens alike.
        axes[group] = _Axis.of(size, real, left=cuts.left, without=size if masks else 1)
    return axes


def _of_examples(values: IntArray, each: int) -> IntArray:
    """Arrange values of rows, int64 (rows,), by block and example: (each, examples)."""
    return values.reshape(each, -1) if each > 1 and len(values) % each == 0 else values[None]


def _predicted(batch: Batch, rows: int, each: int) -> IntArray | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or not labels.dim() or len(labels) != rows:
        return None
    if labels.dim() > 2:
        return None
    counted = (labels != IGNORED).reshape(rows, -1).cpu().numpy()
    after = counted[:, 1:] if labels.dim() == 2 else counted
    sums = [_of_examples(of.sum(axis=1), each).sum(axis=0) for of in (counted, after)]
    return np.array(sums, dtype=np.int64)
