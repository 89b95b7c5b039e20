"""When the tensors of one forward and backward pass are allocated and freed under a plan, in order.

A recording (`memory/recording.py`) is of a step in which every module is adapted and no layer runs again. Under a plan
fewer tensors outlive the forward pass, and those of a checkpointed segment are allocated twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from .autograd_flow import adapted_modules
from .recording import NEVER, Recording, Segment


@dataclass(frozen=True, eq=False)
class StepEvents:
    """The allocations of one pass.

    Attributes:
        sizes: bytes of each tensor's storage, int64 (tensors,).
        order: what happens, one after the other: tensor i is allocated (i) or freed (-1 - i), int64 (events,).
        gradients: the tensors that are gradients of parameters.
        others: further tensors that the pass leaves allocated, such as a kept output.
    """

    sizes: IntArray
    order: IntArray
    gradients: IntArray
    others: IntArray


def step_events(recording: Recording, sizes: FloatArray, ranks: IntArray) -> StepEvents:
    """The allocations of a step under a plan.

    Args:
        recording: of the step.
        sizes: bytes of each recorded storage under the plan, (storages,).
        ranks: the plan, (modules,).
    """
    return _Events(recording, sizes, ranks).events()


def evaluation_events(recording: Recording, sizes: FloatArray) -> StepEvents:
    """The allocations of a forward pass in which autograd saves nothing; see `step_events`."""
    serials = np.flatnonzero(recording.created <= recording.forward_end)
    ended = np.where(recording.freed_if_unsaved > recording.forward_end, NEVER, recording.freed_if_unsaved)
    return _in_order(recording, sizes, serials, recording.created[serials], ended[serials])


def _in_order(recording: Recording, sizes: FloatArray, serials: IntArray, born: IntArray, died: IntArray) -> StepEvents:
    """The events of storages, some of them twice, with their births and deaths; all (tensors,) but the first two."""
    used = sizes[serials] > 0
    serials, born, died = serials[used], born[used], died[used]
    ends = np.flatnonzero(died < NEVER)
    # Tensors are allocated in the order of their serial numbers, and before others are freed at the same time.
    keys = np.concatenate([2 * born, 2 * died[ends] + 1])
    events = np.concatenate([np.arange(len(serials)), -1 - ends])
    stays = died == NEVER
    gradient = np.isin(serials, list(recording.gradients))
    return StepEvents(
        sizes[serials].astype(np.int64),
        events[np.argsort(keys, kind="stable")],
        np.flatnonzero(stays & gradient),
        np.flatnonzero(stays & ~gradient),
    )


class _Events:
    def __init__(self, recording: Recording, sizes: FloatArray, ranks: IntArray) -> None:
        self._recording, self._sizes = recording, sizes
        self._adapted = adapted_modules(ranks)
        self._needed = self._mask(recording.needed)
        self._saved_in_segment = self._mask(recording.saved_in_segment)
        self._forward = recording.created <= recording.forward_end
        # Within one time, the second run of a segment comes after all else; its own times are counted from 1.
        self._scale = 2 + max((segment.end - segment.start for segment in recording.segments), default=0)

    def _mask(self, by_serial: dict[int, int]) -> BoolArray:
        """Storages that one of the adapted modules needs, or that are there under every plan, bool (storages,)."""
        mask = np.zeros(len(self._sizes), dtype=np.bool_)
        mask[[serial for serial, modules in by_serial.items() if modules & self._adapted or not modules]] = True
        return mask

    def events(self) -> StepEvents:
        runs = [self._first_run(), *self._second_runs()]
        serials, born, died = (np.concatenate(columns) for columns in zip(*runs, strict=True))
        return _in_order(self._recording, self._sizes, serials, born, died)

    def _first_run(self) -> tuple[IntArray, IntArray, IntArray]:
        """Serial numbers, births and deaths of what the pass allocates, second runs of segments aside."""
        recording = self._recording
        freed = np.where(self._forward & ~self._needed, recording.freed_if_unsaved, recording.freed)
        for serial, phases in recording.needed_later.items():
            freed[serial] = next((time for time, modules in phases if not modules & self._adapted), freed[serial])
        for index, segment in enumerate(recording.segments):
            if self._runs_again(index):
                inputs = list(segment.inputs)
                freed[inputs] = np.maximum(freed[inputs], self._backward_end(index))
        gradients = np.array(list(recording.gradients), dtype=np.int64)
        exists = self._forward | self._needed
        exists[gradients] = True
        serials = np.flatnonzero(exists)
        return serials, self._scale * recording.created[serials], self._scaled(freed[serials])

    def _second_runs(self) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
        """The same of each segment that runs again."""
        for index, segment in enumerate(self._recording.segments):
            if self._runs_again(index):
                yield self._second_run(index, segment)

    def _second_run(self, index: int, segment: Segment) -> tuple[IntArray, IntArray, IntArray]:
        recording = self._recording
        start = self._scale * recording.second_run_start(index) + 1
        within = self._forward & (recording.segment_index == index)
        saved = within & self._saved_in_segment
        # Checkpointing that is not reentrant stops once all is there again that was saved, frozen weights as well. So
        # under any plan it comes as far as if all modules were adapted.
        last = segment.end
        if not segment.reentrant:
            own = [serial for serial in segment.saved if within[serial]]
            last = int(recording.created[own].max())
        serials = np.flatnonzero(within & (recording.created <= last))
        soon = start + np.minimum(recording.freed_if_unsaved[serials], last) - segment.start
        died = np.where(saved[serials], self._scaled(recording.freed[serials]), soon)
        if segment.reentrant:
            died[np.isin(serials, segment.outputs)] = self._scale * self._backward_end(index)
        return serials, start + recording.created[serials] - segment.start, died

    def _runs_again(self, index: int) -> bool:
        """Whether a segment holds anything for the backward pass, so that it runs again."""
        within = self._saved_in_segment & (self._recording.segment_index == index)
        return bool(within.any()) and self._recording.second_run_start(index) >= 0

    def _backward_end(self, index: int) -> int:
        """The time of the last operation through which gradients flow in a segment."""
        recording = self._recording
        return int(recording.created[~self._forward & (recording.segment_index == index)].max())

    def _scaled(self, times: IntArray) -> IntArray:
        return np.where(times == NEVER, NEVER, self._scale * np.minimum(times, NEVER // self._scale - 1))
