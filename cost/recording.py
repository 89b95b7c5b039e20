"""A recorded training step: its batch's shape, and the bytes, the life and the users of every tensor.

An operation takes part in the backward pass if one of its inputs depends on something that trains. Autograd saves a
tensor for the gradient of certain inputs of one operation (a product saves each factor for the gradient of the other).
Under a plan it is saved exactly if one of those inputs depends on an adapted module. So a recording of one step in
which *every* module is adapted tells what any other plan would save; which modules each operation serves is read from
autograd's graph. `cost/recorder.py` makes recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from ..common.arrays import BoolArray, IntArray
from .cost import ModuleSet

_SAVED_FOR: dict[str, dict[str, int]] = {
    "MmBackward0": {"self": 1, "mat2": 0},
    "BmmBackward0": {"self": 1, "mat2": 0},
    "MvBackward0": {"self": 1, "vec": 0},
    "AddmmBackward0": {"mat1": 2, "mat2": 1},
    "BaddbmmBackward0": {"batch1": 2, "batch2": 1},
    "MulBackward0": {"self": 1, "other": 0},
    "DivBackward0": {"self": 1},
    "LinearBackward0": {"input": 1, "weight": 0},
}
"""Operations that save a tensor for the gradient of one input: by name of the saved tensor, the number of that input
(tools/autograd/derivatives.yaml of PyTorch). Any other operation counts as saving for all of its inputs, which can only
over-estimate."""


def adapted_modules(ranks: IntArray | BoolArray) -> ModuleSet:
    """The modules that a plan adapts, with what always trains; `ranks`, or whether each is above 0, (modules,)."""
    return sum(1 << int(module) for module in np.flatnonzero(ranks)) | 1 << len(ranks)


def flow_from(loss: torch.Tensor, trains: Callable[[torch.Tensor], ModuleSet]) -> dict[Any, ModuleSet]:
    """For each node of the graph of `loss`, the modules of which at least one must be adapted for the node to exist.

    `trains` returns the modules to which a leaf of the graph belongs.
    """
    flow: dict[Any, ModuleSet] = {}
    stack = [loss.grad_fn] if loss.grad_fn is not None else []
    while stack:
        node = stack[-1]
        if node in flow:
            stack.pop()
            continue
        inputs = [source for source, _ in node.next_functions if source is not None]
        waiting = [source for source in inputs if source not in flow]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        modules = trains(node.variable) if hasattr(node, "variable") else 0
        for source in inputs:
            modules |= flow[source]
        flow[node] = modules
    return flow


def saved_by(node: Any, flow: dict[Any, ModuleSet]) -> Iterator[tuple[Any, ModuleSet]]:
    """Yield each value that a node saved, as the saved-tensor hooks packed it, and the modules that it is saved for."""
    saved_for = _SAVED_FOR.get(node.name(), {})
    sources = node.next_functions
    for attribute in _saving_attributes(node.__class__):
        saved = getattr(node, attribute)
        number = saved_for.get(attribute.removeprefix("_raw_saved_"))
        modules = flow[node]
        if number is not None and number < len(sources):
            modules = flow.get(sources[number][0], 0)
        for entry in saved if isinstance(saved, tuple) else (saved,):
            if entry.data is not None:
                yield entry.data, modules


def kept_on_context(node: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a Python function keeps on its context, where hooks do not see them."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        yield from (value for value in tree_iter(vars(node)) if isinstance(value, torch.Tensor))


@cache
def _saving_attributes(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


NEVER = np.iinfo(np.int64).max
"""The time of an event that does not happen within the step."""

Batch = Any
"""What a loss function takes: as a rule keyword arguments of the model, in any nesting of mappings and lists."""


Phases = tuple[tuple[int, ModuleSet], ...]
"""Rising times, and the modules that need a storage after each; they become fewer."""


@dataclass(frozen=True)
class Segment:
    """A part of the forward pass that gradient checkpointing runs again in the backward pass.

    Attributes:
        start: the time at which it begins.
        end: the time at which it ends.
        inputs: serial numbers of its input tensors' storages.
        outputs: serial numbers of its output tensors' storages.
        sequences: autograd's sequence number at its start and end.
        reentrant: whether the second run builds a separate graph, which holds the outputs until its backward pass ends.
        name: name of the module that runs again.
        saved: storages that its operations save for the backward pass, and the target modules that need each: what the
            second run holds and, without checkpointing, the first one.
    """

    start: int
    end: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sequences: tuple[int, int]
    reentrant: bool
    name: str
    saved: dict[int, ModuleSet] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Recording:
    """A training step in which every module is adapted.

    Storages have serial numbers, in the order of creation; times are numbers of operators run before.

    Attributes:
        sizes: bytes of each storage, int64 (storages,).
        created: when each storage is created, int64 (storages,).
        freed: when it is freed; NEVER if it outlives the step; int64 (storages,).
        freed_if_unsaved: when it would be freed if autograd saved nothing, int64 (storages,).
        name_index: index into `names` of the module in whose forward or backward pass it is created, int64 (storages,).
        target_index: the target module in whose forward or backward pass it is created, -1 for none, int64 (storages,).
        segment_index: the checkpointed segment in whose forward or backward pass it is created, -1 for none, int64
            (storages,).
        needed: by serial number, the target modules that need a storage. In the forward pass: it is held beyond
            `freed_if_unsaved` if one of them is adapted. In the backward pass: it exists only if one of them is.
        needed_later: storages of the backward pass that fewer modules need later: by serial number, the modules that
            count after each of some times, in place of those of `needed`.
        on_context_until: storages that a Python autograd function keeps on its context, where autograd's hooks do not
            see them: by serial number, the time at which the parent of the function's module returned.
        uses_saved: whether the operation that created it, in the backward pass, uses a saved tensor, bool (storages,).
        gradients: by serial number of a parameter's gradient, the parameter's target module; -1 for other parameters.
        added_at: by serial number of a parameter's gradient, the time at which it is added to the parameter.
        names: names of all modules.
        forward_end: the time at which the loss is known.
        segments: the checkpointed segments, in forward order.
        inputs_on_device: of how many segments inputs are on the device at once, where the others' lie in main memory;
            0 where all are on the device.
    """

    sizes: IntArray
    created: IntArray
    freed: IntArray
    freed_if_unsaved: IntArray
    name_index: IntArray
    target_index: IntArray
    segment_index: IntArray
    needed: dict[int, ModuleSet]
    needed_later: dict[int, Phases]
    on_context_until: dict[int, int]
    uses_saved: BoolArray
    gradients: dict[int, int]
    added_at: dict[int, int]
    names: tuple[str, ...]
    forward_end: int
    segments: tuple[Segment, ...]
    inputs_on_device: int = 0

    @cached_property
    def needed_in_phases(self) -> tuple[dict[int, ModuleSet], ...]:
        """`needed`, and what takes its place after the first, the second, ... of the times of `needed_later`."""
        count = max(map(len, self.needed_later.values()), default=0)
        later = [
            {serial: phases[index][1] for serial, phases in self.needed_later.items() if index < len(phases)}
            for index in range(count)
        ]
        return self.needed, *later

    @cached_property
    def saved_in_segment(self) -> dict[int, ModuleSet]:
        """By serial number of a storage created in a segment, the target modules for which that segment saves it."""
        return {
            serial: modules
            for index, segment in enumerate(self.segments)
            for serial, modules in segment.saved.items()
            if self.segment_index[serial] == index
        }

    def second_run_start(self, index: int) -> int:
        """The time at which a segment runs again, just before gradients flow through it; -1 if none do."""
        flowing = (self.created > self.forward_end) & (self.segment_index == index)
        if not self.segments[index].reentrant:  # it runs again for the first operation that uses a saved tensor
            flowing &= self.uses_saved
        return int(self.created[flowing].min()) - 1 if flowing.any() else -1

    def with_checkpointed(self, layers: Collection[str]) -> Recording:
        """The same step with fewer checkpointed segments.

        Args:
            layers: names of the modules that still run again in the backward pass. Of the others, what their
                operations save is held from the forward pass on.
        """
        kept = [index for index, segment in enumerate(self.segments) if segment.name in layers]
        needed = dict(self.needed)
        for segment in self.segments:
            if segment.name not in layers:
                for serial, modules in segment.saved.items():
                    needed[serial] = needed.get(serial, 0) | modules
        numbers = np.full(len(self.segments) + 1, -1)  # the last is for storages of no segment, whose index is -1
        numbers[kept] = np.arange(len(kept))
        segments = tuple(self.segments[index] for index in kept)
        return replace(self, segments=segments, needed=needed, segment_index=numbers[self.segment_index])

    def accumulating(self) -> Recording:
        """The same step where the parameters have gradients already, of a batch before: new ones are soon freed.

        The gradients that are there are not among its storages.
        """
        freed = self.freed.copy()
        freed[list(self.added_at)] = list(self.added_at.values())
        return replace(self, freed=freed, gradients={})

    def saved_under(self, ranks: IntArray) -> BoolArray:
        """Whether autograd holds each storage at the end of the forward pass under a plan, bool (storages,).

        Storages saved inside checkpointed segments are left out. `ranks` has shape (modules,).
        """
        adapted = adapted_modules(ranks)
        saved = np.zeros(len(self.sizes), dtype=np.bool_)
        saved[[serial for serial, modules in self.needed.items() if modules & adapted]] = True
        result: BoolArray = saved & (self.created <= self.forward_end) & (self.freed > self.forward_end)
        return result


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


MASK, PLACES = "attention_mask", "position_ids"

LIMITS, LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
"""Where the texts of a row without padding begin and end, int32 (texts + 1,), and the tokens of the longest one."""


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
    """The same batch with its last token masked, because models skip work if a mask masks nothing.

    So is that of each part of it that has a mask of its own, such as the "chosen_attention_mask" of pairs of answers.
    """
    masks = {name: mask.clone() for name, mask in _masks(batch).items() if mask.dim() == 2}
    for mask in masks.values():  # padding is on the left if the first column has any
        mask[-1, 0 if mask.shape[1] > 1 and not mask[:, 0].all() else -1] = 0
    return {**batch, **masks} if masks else batch


def in_texts(batch: Batch) -> Batch:
    """The same batch with its last token as a text of its own, because models skip work if each row is one text."""
    if not _tells_places(batch) or _holds_texts(batch):
        return batch
    places = batch[PLACES].clone()
    places[-1, -1] = 0
    return {**batch, PLACES: places}


def _tells_places(batch: Batch) -> bool:
    places = batch.get(PLACES) if isinstance(batch, Mapping) else None
    return isinstance(places, torch.Tensor) and places.dim() == 2 and places.shape[1] > 1


def _holds_texts(batch: Batch) -> bool:
    """Whether a row holds several texts, at each of which positions begin again."""
    return _tells_places(batch) and bool((batch[PLACES].diff() != 1).any())


def has_no_padding(batch: Batch) -> bool:
    """Whether a batch has a mask that masks nothing; models may skip work then."""
    masks = _masks(batch)
    return bool(masks) and all(bool(mask.all()) for mask in masks.values())


def _masks(batch: Batch) -> dict[str, torch.Tensor]:
    """The masks of a batch by their names."""
    named = batch.items() if isinstance(batch, Mapping) else ()
    return {name: part for name, part in named if str(name).endswith(MASK) and isinstance(part, torch.Tensor)}


def reshaped(batch: Batch, shape: BatchShape, rows_per_example: int = 1) -> Batch:
    """The batch cut or repeated to a shape.

    A tensor shorter than the longest (labels of an encoder-decoder) changes in proportion. If the batch has padding,
    so does the result, and if a row holds several texts, one does in the result.

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
    result = _with_limits(result, shape.rows * shape.length, old.rows * old.length)
    result = in_texts(result) if _holds_texts(batch) else result
    return result if all(bool(mask.all()) for mask in _masks(batch).values()) else padded(result)


def _with_limits(result: Batch, tokens: int, before: int) -> Batch:
    """A batch of so many tokens, and of others before, whose texts in one row have their limits beside it.

    Flash attention reads up to the last limit without a check, so all limits move alike, and as many texts are left.
    """
    if not isinstance(result, Mapping):
        return result
    moved = {name: (result[name].long() * tokens // before).int() for name in LIMITS if result.get(name) is not None}
    longest = {name: -(-result[name] * tokens // before) for name in LONGEST if result.get(name) is not None}
    return {**result, **moved, **longest}


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
    mask = _masks(batch).get(MASK)
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
