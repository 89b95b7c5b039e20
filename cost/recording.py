"""A recorded training step: its batch's shape, and the bytes, the life and the users of every tensor.

An operation takes part in the backward pass if one of its inputs depends on something that trains. Autograd saves a
tensor for the gradient of certain inputs of one operation (a product saves each factor for the gradient of the other).
Under a plan it is saved exactly if one of those inputs depends on an adapted module. So a recording of one step in
which *every* module is adapted tells what any other plan would save; which modules each operation serves is read from
autograd's graph. `cost/recorder.py` makes recordings.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, IntArray
from .cost import ModuleSet


def adapted_modules(ranks: IntArray | BoolArray) -> ModuleSet:
    """The modules that a plan adapts, with what always trains; `ranks`, or whether each is above 0, (modules,)."""
    return sum(1 << int(module) for module in np.flatnonzero(ranks)) | 1 << len(ranks)


NEVER = np.iinfo(np.int64).max
"""The time of an event that does not happen within the step."""


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

    def joined(self, other: BatchShape) -> BatchShape:
        """The smallest shape that covers both."""
        return BatchShape(max(self.rows, other.rows), max(self.length, other.length))

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"
