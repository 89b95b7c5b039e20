"""The rows of a batch: how long each is without padding, and the batch that holds only some of them.

Numbers beside each other are tokens only where their count follows the length of the text: features of 16 numbers are
none, also in a batch whose texts have 16 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..common.arrays import BoolArray, IntArray
from ..cost.batch_shape import LIMITS, LONGEST, MASK, PLACES, Batch, like, shape_of
from ..cost.recording import BatchShape
from ..data.batches import IGNORED
from ..errors import UnsupportedError


@dataclass(frozen=True)
class Cuts:
    """What may be cut from the batches of a run.

    Attributes:
        groups: names of the tensors whose second axis holds tokens, those together that always have one number of them.
        left: whether padding on the left may be cut as well as that on the right.
    """

    groups: tuple[frozenset[str], ...]
    left: bool = False

    @classmethod
    def seen_in(cls, batches: Iterable[Batch], *, left: bool) -> Cuts:
        """What a few batches of one example each show: of an axis that never changes, its name has to tell.

        Args:
            batches: of different examples.
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
        if any(len(set(each)) > 1 for each in groups):  # then a constant is none
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
"""Ends of the names of tensors that have a number for each token."""


@dataclass(frozen=True)
class _Axis:
    """The tokens of a group of tensors.

    Attributes:
        size: tokens, padding included.
        first: the first token of each row that is no padding, int64 (rows,).
        end: the token after the last one, int64 (rows,); all of a row without tokens are padding.
    """

    size: int
    first: IntArray
    end: IntArray

    @classmethod
    def of(cls, size: int, real: BoolArray, *, left: bool, without: int) -> _Axis:
        """Of the tokens that are no padding, bool (rows, tokens); of that on the `left` if it may be cut.

        A row of padding alone has the tokens `without`.
        """
        some = real.any(axis=1)
        first = np.where(some & left, real.argmax(axis=1), 0)
        return cls(size, first, np.where(some, size - real[:, ::-1].argmax(axis=1), without))

    @property
    def lengths(self) -> IntArray:
        """Tokens that each row takes where padding is cut on one side, the same for all rows, int64 (rows,)."""
        right, left = self.end - self.first.min(), self.end.max() - self.first
        lengths: IntArray = right if right.sum() <= left.sum() else left
        return lengths

    def cut(self, rows: IntArray, multiple: int) -> slice:
        """The tokens of some rows without the padding that all of them have, a multiple of so many where there are."""
        first, end = int(self.first[rows].min()), int(self.end[rows].max())
        missing = -(end - first) % multiple
        after = min(missing, self.size - end)
        return slice(max(first - (missing - after), 0), end + after)


@dataclass(frozen=True)
class BatchRows:
    """A batch whose examples can be told apart.

    Attributes:
        batch: the batch.
        shape: of the batch, padding included.
        examples: how many it has.
        lengths: tokens of each example without the padding that can be cut, int64 (examples,); those of the longest row
            where an example has several. 1 where the batch has no axis of tokens.
        each: rows of an example, one in each block of the batch.
        packed: whether examples are texts side by side in one row, told apart by their positions.
        predicted: predictions of each example that the loss counts, and those but for a first token, int64 (2,
            examples); None without labels of tokens.
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
        """Tell the examples of a batch apart.

        Args:
            batch: with one tensor or list entry for each row, in any nesting.
            cuts: what may be cut from it.
            each: rows that an example takes; see `reshaped`.

        Raises:
            UnsupportedError: something in it belongs to no row.
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
        """The batch of some examples, without the padding that all of them have.

        Args:
            examples: their places, rising.
            multiple: of which the tokens of a row are one, as far as there is padding.
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
        """The same rows with other labels."""
        return BatchRows.of(like(self.batch, {**self.batch, "labels": labels}), cuts, self.each)

    def _texts(self, chosen: IntArray) -> Batch:
        """Some texts of a packed row side by side, with limits of their own where the batch has limits."""
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
        """What a tensor with the batch's tokens has of an example, as a view; of its first row if it has several."""
        if not self.packed:
            return tensor[example]
        end = int(self.lengths[: example + 1].sum())
        return tensor[0, end - int(self.lengths[example]) : end]

    def span(self, examples: Sequence[int]) -> slice:
        """The tokens of the batch that a part of these examples has."""
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
        """The tensors and lists of the batch with their names."""
        yield from _named(self.batch)

    @property
    def tokens(self) -> int:
        """Tokens of the batch, padding included; of an example with several rows those of one."""
        return (1 if self.packed else self.examples) * self.shape.length

    @property
    def token_bytes(self) -> float:
        """Bytes of a batch for each of its tokens: a part has a copy of its own."""
        tensors = (value for _, value in _named(self.batch) if isinstance(value, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors) / max(self.tokens, 1)

    def shares(self, parts: Sequence[Sequence[int]], kind: str) -> list[float]:
        """By what the loss of each part is multiplied, so that they add up to that of the batch.

        Args:
            parts: the places of their examples.
            kind: one of `SHARES`.
        """
        if kind == SUM:
            return [1.0] * len(parts)
        counts: Any = np.ones(self.examples)
        if kind != ROWS and self.predicted is not None:
            counts = self.predicted[int(kind == NEXT_TOKENS)]
        total = counts.sum()
        return [float(counts[list(part)].sum() / total) if total else 0.0 for part in parts]


_PICTURES = ("pixel_", "image_", "video_")

_TEXTS = ("input_ids", "labels")
"""What tells the rows of a batch where it is there, beside masks: pictures may lie in pieces of their own."""

SUM, ROWS, TOKENS, NEXT_TOKENS = SHARES = ("sum", "mean over rows", "mean over tokens", "mean over next tokens")
"""What a loss is of its rows: their sum, or a mean over rows, over predictions, or over those but for a first token."""


def _named(batch: Batch, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and lists of a batch with their names, those of mappings inside of others after a dot."""
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
    """The batch with each of its tensors and lists changed, which get their names as of `_named`."""
    if isinstance(batch, Mapping):
        items = {key: _changed(value, change, f"{name}.{key}" if name else str(key)) for key, value in batch.items()}
        return like(batch, items)
    if isinstance(batch, torch.Tensor) or (isinstance(batch, list | tuple) and not _holds_tensors(batch)):
        return change(name, batch)
    return type(batch)(_changed(value, change, name) for value in batch) if isinstance(batch, list | tuple) else batch


def _check_rows(name: str, value: Any, rows: int, examples: int, *, texts: bool) -> None:
    """Raise UnsupportedError for something that has entries, and not one for each row."""
    if name.startswith(_PICTURES) and texts:
        raise UnsupportedError(f"{name} is of pictures, of which a row may have several")
    if name in (*LIMITS, *LONGEST):
        raise UnsupportedError(f"{name} tells where texts end that share a row")
    size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None
    if isinstance(value, torch.Tensor) and size not in (None, rows, examples, 1):
        raise UnsupportedError(f"{name or 'a tensor'} has {size} entries where the batch has {rows} rows")
    if isinstance(value, list | tuple) and value and len(value) not in (rows, examples):
        raise UnsupportedError(f"{name or 'a list'} has {len(value)} entries where the batch has {rows} rows")


def _starts_of_texts(batch: Batch) -> IntArray | None:
    """Where the texts of a packed batch begin, int64 (texts,): one row, in which positions begin again at each text.

    None where there is no such row, or something in the batch belongs to no token.
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
    """Tokens of the longest text of a packed batch, and one that `in_texts` may have cut off; None of any other one."""
    starts, length = _starts_of_texts(batch), shape_of(batch).length
    return None if starts is None else min(int(np.diff(starts, append=length).max()) + 1, length)


def _predicted_in_texts(batch: Batch, starts: IntArray) -> IntArray | None:
    """See `BatchRows.predicted`."""
    if batch.get("labels") is None:
        return None
    counted = (batch["labels"][0] != IGNORED).cpu().numpy().astype(np.int64)
    sums = np.add.reduceat(counted, starts)
    return np.array([sums, sums - counted[starts]])


def _axes_of(batch: Batch, cuts: Cuts, rows: int) -> dict[frozenset[str], _Axis]:
    """The axes of tokens of a batch by their group; of one that nothing tells about, no padding is known.

    A mask tells the padding of tensors of its group, and so do labels that no loss counts; one that some loss counts is
    no padding. Where inputs have no mask, all of their tokens are read.
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
        # Attention that is all masked may look at all tokens alike.
        axes[group] = _Axis.of(size, real, left=cuts.left, without=size if masks else 1)
    return axes


def _of_examples(values: IntArray, each: int) -> IntArray:
    """Values of rows, int64 (rows,), by block and example: (each, examples)."""
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
