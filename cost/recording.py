"""A recorded training step: its batch shape, and the size, lifetime and users of every tensor.

An operation takes part in the backward pass if one of its inputs depends on a trained parameter. Autograd saves a
tensor for the gradients of certain inputs of one operation (a product saves each factor for the gradient of the other).
A plan saves it exactly if one of those inputs depends on an adapted module. One recorded step with *every* module
adapted therefore shows what any other plan would save. Autograd's graph shows the modules that each operation serves.
`cost/record/recorder.py` makes recordings.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..common.arrays import BoolArray, IntArray
from .cost import ModuleSet


def adapted_modules(ranks: IntArray | BoolArray) -> ModuleSet:
    """Return the modules a plan adapts, and what always trains; `ranks` holds ranks or flags, (modules,)."""
    return sum(1 << int(module) for module in np.flatnonzero(ranks)) | 1 << len(ranks)


NEVER = np.iinfo(np.int64).max
"""Time of an event outside the step."""


Phases = tuple[tuple[int, ModuleSet], ...]
"""Increasing times, and the shrinking sets of modules that need a storage after each."""


@dataclass(frozen=True)
class Segment:
    """A part of the forward pass recomputed in the backward pass under gradient checkpointing.

    Attributes:
        start: start time.
        end: end time.
        inputs: serial numbers of its input tensors' storages.
        outputs: serial numbers of its output tensors' storages.
        sequences: autograd's sequence number at its start and end.
        reentrant: whether recomputation builds a separate graph, which holds the outputs until its backward pass ends.
        name: name of the recomputed module.
        saved: storages saved by its operations for the backward pass, and the target modules that need each; held by
            the second run and, without checkpointing, by the first.
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
    """A training step with every module adapted.

    Storages have serial numbers in order of creation; times count the operators run before.

    Attributes:
        sizes: bytes of each storage, int64 (storages,).
        created: creation time of each storage, int64 (storages,).
        freed: time each is freed; NEVER if it outlives the step; int64 (storages,).
        freed_if_unsaved: time each would be freed if autograd saved nothing, int64 (storages,).
        name_index: index into `names` of the module whose forward or backward pass creates it, int64 (storages,).
        target_index: target module whose forward or backward pass creates it, -1 for none, int64 (storages,).
        segment_index: checkpointed segment whose forward or backward pass creates it, -1 for none, int64 (storages,).
        needed: target modules that need a storage, by serial number. A storage of the forward pass outlives
            `freed_if_unsaved` if any of them is adapted; one of the backward pass exists only if any of them is.
        needed_later: storages of the backward pass that fewer modules need later: by serial number, the modules that
            replace those of `needed` after each of some times.
        on_context_until: storages a Python autograd function keeps on its context, invisible to autograd's hooks: by
            serial number, the time at which the parent of the function's module returned.
        uses_saved: whether the backward operation that created it uses a saved tensor, bool (storages,).
        gradients: target module of each parameter gradient, by serial number; -1 for other parameters.
        added_at: time at which each parameter gradient is accumulated, by serial number.
        names: names of all modules.
        forward_end: time at which the loss is known.
        segments: the checkpointed segments, in forward order.
        inputs_on_device: number of segments whose inputs are on the device at once while the others are offloaded; 0 if
            all stay on the device.
        gathers: serial numbers of frozen weights gathered from other cards; see `cost/gathers.py`.
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
    gathers: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the checkpointed layers, in forward order; a layer may have several segments."""
        return tuple(dict.fromkeys(segment.name for segment in self.segments))

    @cached_property
    def needed_in_phases(self) -> tuple[dict[int, ModuleSet], ...]:
        """`needed`, and its successive replacements at the times of `needed_later`."""
        count = max(map(len, self.needed_later.values()), default=0)
        later = [
            {serial: phases[index][1] for serial, phases in self.needed_later.items() if index < len(phases)}
            for index in range(count)
        ]
        return self.needed, *later

    @cached_property
    def saved_in_segment(self) -> dict[int, ModuleSet]:
        """Target modules for which a segment saves each storage created in it, by serial number."""
        return {
            serial: modules
            for index, segment in enumerate(self.segments)
            for serial, modules in segment.saved.items()
            if self.segment_index[serial] == index
        }

    def second_run_start(self, index: int) -> int:
        """Return the time at which a segment is recomputed, just before gradients reach it; -1 if none do."""
        flowing = (self.created > self.forward_end) & (self.segment_index == index)
        if not self.segments[index].reentrant:  # recomputed for the first operation that uses a saved tensor
            flowing &= self.uses_saved
        return int(self.created[flowing].min()) - 1 if flowing.any() else -1

    def with_checkpointed(self, layers: Collection[str]) -> Recording:
        """Return the same step with fewer checkpointed segments.

        Args:
            layers: names of the modules still recomputed in the backward pass. Tensors saved by the others are held
                from the forward pass on.
        """
        kept = [index for index, segment in enumerate(self.segments) if segment.name in layers]
        needed = dict(self.needed)
        for segment in self.segments:
            if segment.name not in layers:
                for serial, modules in segment.saved.items():
                    needed[serial] = needed.get(serial, 0) | modules
        numbers = np.full(len(self.segments) + 1, -1)  # the last is for storages outside segments, with index -1
        numbers[kept] = np.arange(len(kept))
        segments = tuple(self.segments[index] for index in kept)
        return replace(self, segments=segments, needed=needed, segment_index=numbers[self.segment_index])

    def accumulating(self) -> Recording:
        """Return the same step with gradients left from an earlier batch: new ones are soon freed.

        Existing gradients are not among its storages.
        """
        freed = self.freed.copy()
        freed[list(self.added_at)] = list(self.added_at.values())
        return replace(self, freed=freed, gradients={})

    def rank_of_each(self, ranks: IntArray) -> IntArray:
        """Return the rank of each storage's target module under a plan, or 1 if it has none, (storages,)."""
        return np.where(self.target_index >= 0, np.asarray(ranks)[self.target_index], 1)

    def saved_under(self, ranks: IntArray) -> BoolArray:
        """Return the storages autograd holds at the end of the forward pass under a plan, bool (storages,).

        Storages saved inside checkpointed segments are excluded. `ranks` has shape (modules,).
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
        length: tokens per example, including padding; 1 if the batch has no token axis.
    """

    rows: int
    length: int

    def joined(self, other: BatchShape) -> BatchShape:
        """Return the smallest shape to cover both."""
        return BatchShape(max(self.rows, other.rows), max(self.length, other.length))

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"
