"""Model of torch's caching allocator: predicts the reserved memory of a plan by replaying two training steps.

A card must hold the allocator's reserved memory, which exceeds the tensors: blocks are split off segments allocated by
the driver, and a segment persists until the process ends or the cache is emptied. Source:
c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.6 to 2.9, with default settings and one stream.

The replay uses a recording (`cost/recording.py`) of a step with every module adapted and no checkpointing. Under a plan
fewer tensors outlive the forward pass, and those of checkpointed segments are allocated twice. The first step warms up:
libraries allocate workspaces, and the optimizer its state. The second step then runs in segments fragmented by the
first.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.arrays import BoolArray, FloatArray, IntArray
from ..model import MemoryModel
from ..moments import Evaluation, forward_span
from ..recording import NEVER, BatchShape, Recording, Segment, adapted_modules

_MIB = 2**20

BLOCK_BYTES = 512
"""Sizes are rounded up to multiples of this many bytes."""

SMALL_BYTES = _MIB
"""Largest block served from small segments; larger blocks are not split for a remainder below this size."""

SMALL_SEGMENT_BYTES = 2 * _MIB
"""Size of a segment for small blocks; larger segments are multiples of it."""

LARGE_SEGMENT_BYTES = 20 * _MIB
"""Size of a segment for blocks below `LARGE_BLOCK_BYTES`."""

LARGE_BLOCK_BYTES = 10 * _MIB
"""A block of at least this size gets a segment of its own."""


_LARGE_ADDRESSES = 2**60
"""Start address of the expandable segment for large blocks."""

_SIZE, _ADDRESS = 2**62, 2**62 - 1
"""A free block is encoded as size times the first plus address: integers compare faster than pairs."""


@dataclass(slots=True)
class _Block:
    """A piece of a segment, linked to its neighbours."""

    size: int
    small: bool
    free: bool = False
    before: int | None = None
    after: int | None = None


class CachingAllocator:
    """The allocator's bookkeeping, without memory.

    Attributes:
        allocated: bytes of the blocks in use.
        reserved: bytes of all segments.
        peak_allocated: the highest value of `allocated` so far, or since `restart_peak`.
        peak_reserved: the highest value of `reserved` so far.
    """

    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int

    def __init__(self, expandable: bool = False) -> None:
        self._last: dict[bool, int] | None = {} if expandable else None  # last block of each pool's segment
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._blocks: dict[int, _Block] = {}  # by address
        self._free: dict[bool, list[int]] = {True: [], False: []}  # by pool, see `_SIZE`
        self._next_address = 0

    def allocate(self, size: int) -> int:
        """Allocate at least one byte, and return the block's address for `free`."""
        size += -size % BLOCK_BYTES
        small = size <= SMALL_BYTES
        free, blocks = self._free[small], self._blocks
        index = bisect_left(free, size * _SIZE)
        address = free.pop(index) & _ADDRESS if index < len(free) else self._new_block(size, small)
        block = blocks[address]
        block.free = False
        left = block.size - size
        if left >= BLOCK_BYTES and (small or left > SMALL_BYTES):  # split the block; the rest becomes free
            rest, after = address + size, block.after
            blocks[rest] = _Block(left, small, True, address, after)
            if after is not None:
                blocks[after].before = rest
            elif self._last is not None:
                self._last[small] = rest
            insort(free, left * _SIZE + rest)
            block.size, block.after = size, rest
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return address

    def free(self, address: int) -> None:
        """Free a block, and merge it with free neighbours."""
        blocks = self._blocks
        block = blocks[address]
        self.allocated -= block.size
        free, after, before = self._free[block.small], block.after, block.before
        if after is not None and (other := blocks[after]).free:
            del free[bisect_left(free, other.size * _SIZE + after)]
            self._join(address, block, after)
        if before is not None and (other := blocks[before]).free:
            del free[bisect_left(free, other.size * _SIZE + before)]
            self._join(before, other, address)
            address, block = before, other
        block.free = True
        insort(free, block.size * _SIZE + address)

    def restart_peak(self) -> int:
        """Reset `peak_allocated`, and return its previous value."""
        peak, self.peak_allocated = self.peak_allocated, self.allocated
        return peak

    def empty_cache(self) -> None:
        """Release unused segments to the driver; expandable ones stay."""
        if self._last is not None:
            return
        for free in self._free.values():
            for number in list(free):
                block = self._blocks[address := number & _ADDRESS]
                if block.before is None and block.after is None:
                    free.remove(number)
                    self.reserved -= block.size
                    del self._blocks[address]

    def _new_block(self, size: int, small: bool) -> int:
        """Return the address of a sufficiently large block from the driver."""
        unit = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        if self._last is not None:
            return self._expanded(size, small, unit, self._last)
        if not small and size >= LARGE_BLOCK_BYTES:
            unit = -(-size // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        address = self._next_address
        self._blocks[address] = _Block(unit, small)
        self._next_address += unit
        self.reserved += unit
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return address

    def _expanded(self, size: int, small: bool, unit: int, last: dict[bool, int]) -> int:
        """Return a block at the end of a pool's only segment, extended by the missing pages."""
        end = last.get(small)
        tail = None if end is None else self._blocks[end]
        if end is not None and tail is not None and tail.free:
            self._free[small].remove(tail.size * _SIZE + end)
            address, more = end, -(-(size - tail.size) // unit) * unit
            tail.size += more
        else:
            more = -(-size // unit) * unit
            address = 0 if small else _LARGE_ADDRESSES
            if end is not None and tail is not None:
                address, tail.after = end + tail.size, end + tail.size
            self._blocks[address] = _Block(more, small, before=end)
        last[small] = address
        self.reserved += more
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return address

    def _join(self, address: int, block: _Block, after: int) -> None:
        """Merge a block with the next one, which is in no free list."""
        other = self._blocks.pop(after)
        block.size += other.size
        block.after = other.after
        if other.after is not None:
            self._blocks[other.after].before = address
        elif self._last is not None:
            self._last[block.small] = address


@dataclass(frozen=True, eq=False)
class StepEvents:
    """The allocations of one pass.

    Attributes:
        sizes: bytes of each tensor's storage, int64 (tensors,).
        order: events in order: allocation of tensor i (i) or its release (-1 - i), int64 (events,).
        gradients: indices of parameter gradients.
        others: further tensors still allocated after the pass, such as a kept output.
    """

    sizes: IntArray
    order: IntArray
    gradients: IntArray
    others: IntArray


def step_events(recording: Recording, sizes: FloatArray, ranks: IntArray) -> StepEvents:
    """Return the allocations of a step under a plan.

    Args:
        recording: recording of the step.
        sizes: bytes of each recorded storage under the plan, (storages,).
        ranks: the plan, (modules,).
    """
    return _Events(recording, sizes, ranks).events()


def evaluation_events(recording: Recording, sizes: FloatArray) -> StepEvents:
    """Return the allocations of a forward pass without saved tensors; see `step_events`."""
    return _in_order(recording, sizes, *forward_span(recording))


def _in_order(recording: Recording, sizes: FloatArray, serials: IntArray, born: IntArray, died: IntArray) -> StepEvents:
    """Order the events of storages, which may repeat, by their births and deaths, both (tensors,)."""
    used = sizes[serials] > 0
    serials, born, died = serials[used], born[used], died[used]
    ends = np.flatnonzero(died < NEVER)
    # Allocations follow the order of serial numbers, and precede releases at the same time.
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
        # Recomputation comes last within one time step, and has its own clock from 1.
        self._scale = 2 + max((segment.end - segment.start for segment in recording.segments), default=0)

    def _mask(self, by_serial: dict[int, int]) -> BoolArray:
        """Return the storages needed by an adapted module or live under every plan, bool (storages,)."""
        mask = np.zeros(len(self._sizes), dtype=np.bool_)
        mask[[serial for serial, modules in by_serial.items() if modules & self._adapted or not modules]] = True
        return mask

    def events(self) -> StepEvents:
        runs = [self._first_run(), *self._second_runs()]
        serials, born, died = (np.concatenate(columns) for columns in zip(*runs, strict=True))
        return _in_order(self._recording, self._sizes, serials, born, died)

    def _first_run(self) -> tuple[IntArray, IntArray, IntArray]:
        """Return serial numbers, births and deaths of the pass's allocations, without recomputation."""
        recording = self._recording
        freed = np.where(self._forward & ~self._needed, recording.freed_if_unsaved, recording.freed)
        for serial, phases in recording.needed_later.items():
            freed[serial] = next((time for time, modules in phases if not modules & self._adapted), freed[serial])
        for index, segment in enumerate(recording.segments):
            if self._runs_again(index):
                inputs = list(segment.inputs)
                freed[inputs] = np.maximum(freed[inputs], self._held_until(index))
        gradients = np.array(list(recording.gradients), dtype=np.int64)
        exists = self._forward | self._needed
        exists[gradients] = True
        serials = np.flatnonzero(exists)
        return serials, self._scale * recording.created[serials], self._scaled(freed[serials])

    def _second_runs(self) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
        """Yield the same for each recomputed segment, and for its inputs copied back from main memory."""
        recording = self._recording
        for index, segment in enumerate(self._recording.segments):
            if self._runs_again(index):
                yield self._second_run(index, segment)
                if recording.inputs_on_device and self._held_until(index) <= recording.forward_end:
                    back = np.array(
                        [s for s in segment.inputs if recording.freed_if_unsaved[s] < NEVER], dtype=np.int64
                    )
                    times = np.full((2, len(back)), self._scale)
                    yield back, times[0] * recording.second_run_start(index), times[1] * self._backward_end(index)

    def _second_run(self, index: int, segment: Segment) -> tuple[IntArray, IntArray, IntArray]:
        recording = self._recording
        start = self._scale * recording.second_run_start(index) + 1
        within = self._forward & (recording.segment_index == index)
        saved = within & self._saved_in_segment
        # Non-reentrant checkpointing stops once everything saved has been restored, including frozen weights. It
        # therefore gets as far under any plan as with all modules adapted.
        last = segment.end
        if not segment.reentrant:
            own = [serial for serial in segment.saved if within[serial]]
            last = int(recording.created[own].max())
        serials = np.flatnonzero(within & (recording.created <= last))
        soon = start + np.minimum(recording.freed_if_unsaved[serials], last) - segment.start
        # Tensors kept on function contexts die with the graph of the second run.
        freed = np.where(recording.freed[serials] == NEVER, self._backward_end(index), recording.freed[serials])
        died = np.where(saved[serials], self._scaled(freed), soon)
        if segment.reentrant:
            died[np.isin(serials, segment.outputs)] = self._scale * self._backward_end(index)
        return serials, start + recording.created[serials] - segment.start, died

    def _runs_again(self, index: int) -> bool:
        """True if a segment holds anything for the backward pass, so it is recomputed."""
        within = self._saved_in_segment & (self._recording.segment_index == index)
        return bool(within.any()) and self._recording.second_run_start(index) >= 0

    def _held_until(self, index: int) -> int:
        """Return the time until which a segment's inputs stay on the device without interruption."""
        later = index + self._recording.inputs_on_device
        if later == index or later >= len(self._recording.segments):
            return self._backward_end(index)
        return self._recording.segments[later].start

    def _backward_end(self, index: int) -> int:
        """Return the time of the last operation that propagates gradients in a segment."""
        recording = self._recording
        return int(recording.created[~self._forward & (recording.segment_index == index)].max())

    def _scaled(self, times: IntArray) -> IntArray:
        return np.where(times == NEVER, NEVER, self._scale * np.minimum(times, NEVER // self._scale - 1))


STEPS = 2


@dataclass(frozen=True)
class Replayed:
    """Memory of training on a CUDA device, including the frozen model and excluding the context.

    Attributes:
        first: peak bytes of tensors in the first training step.
        allocated: the same in both training steps.
        evaluation: peak bytes of tensors in evaluation; 0 without one.
        between: bytes of tensors between steps.
        reserved: peak bytes held by the allocator.
    """

    first: int
    allocated: int
    evaluation: int
    between: int
    reserved: int


def replay(
    memory: MemoryModel,
    ranks: IntArray,
    loaded: Sequence[int],
    *,
    shape: BatchShape | None = None,
    evaluation: Evaluation | None = None,
    workspace_bytes: int = 0,
    expandable: bool = False,
) -> Replayed:
    """Replay two steps of a plan.

    Args:
        memory: the byte model.
        ranks: the plan, (modules,).
        loaded: bytes of each storage of the frozen model, in loading order.
        shape: shape of the batches; defaults to that of calibration.
        evaluation: batches of an evaluation after the steps; None for none.
        workspace_bytes: bytes that cuBLAS allocates, half of them in each thread.
        expandable: whether the allocator uses `expandable_segments`.

    Raises:
        UnsupportedError: see `MemoryModel.sizes`.
    """
    sizes = memory.sizes_under(ranks, shape)
    run = _Run(CachingAllocator(expandable))
    run.keep(loaded)
    parameters = sizes[list(memory.recording.gradients)]
    states = memory.states
    run.keep(_of_factors(memory, parameters, states.weights * ranks, parameters))
    run.keep([states.others, *((states.signals + states.buckets) * ranks)])
    recordings = [memory.recording, *([memory.recording.accumulating()] if memory.accumulates else [])]
    batches = [step_events(recording, sizes, ranks) for recording in recordings]
    run.keep([workspace_bytes / 2] * 2)
    peaks = []
    for step in range(STEPS):
        for events in batches:
            run.play(events)
        if step == 0:
            run.keep(_optimizer_state(memory, parameters, ranks))
        run.optimizer_step(_scratch(memory, parameters, ranks))
        peaks.append(run.allocator.restart_peak())
    between = run.allocator.allocated
    run.allocator.empty_cache()  # as the allocator itself does before it runs out of memory
    if evaluation:
        before = run.keep([(evaluation.kept - 1) * evaluation.output_bytes])
        run.play(evaluation_events(memory.recording, memory.sizes_under(ranks, evaluation.shape)))
        run.release(run.keep([evaluation.loss_bytes]))
        run.release(run.keep([evaluation.output_bytes, evaluation.kept * evaluation.output_bytes]) + before)
    after = run.allocator.peak_allocated if evaluation else 0
    return Replayed(peaks[0], max(peaks), after, between, run.allocator.peak_reserved)


def _optimizer_state(memory: MemoryModel, parameters: FloatArray, ranks: IntArray) -> list[float]:
    """Return the bytes of the optimizer's tensors, assuming two equal ones per adapter factor."""
    states = memory.states
    state = _of_factors(memory, parameters, states.optimizer * ranks)
    return [*np.repeat(state / 2, 2), *(states.fixed * (ranks > 0))]


def _scratch(memory: MemoryModel, parameters: FloatArray, ranks: IntArray) -> list[float]:
    """Return the bytes of temporaries in the optimizer step."""
    states = memory.states
    return [states.other_gradients, *_of_factors(memory, parameters, states.scratch * ranks)]


def _of_factors(
    memory: MemoryModel, parameters: FloatArray, of_modules: FloatArray, others: FloatArray | float = 0.0
) -> FloatArray:
    """Distribute bytes of modules, (modules,), over their factors in proportion to weights, (parameters,).

    Parameters outside modules get `others`.
    """
    modules = np.array(list(memory.recording.gradients.values()), dtype=np.int64)
    whole = np.bincount(modules + 1, parameters, len(of_modules) + 1)[1:]
    return np.where(modules >= 0, parameters * (of_modules / np.maximum(whole, 1))[modules], others)


class _Run:
    """Runs passes in an allocator."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self._gradients: list[int] = []  # addresses

    def keep(self, sizes: Iterable[float]) -> list[int]:
        """Allocate tensors, and return their addresses."""
        return [self.allocator.allocate(int(size)) for size in sizes if size > 0]

    def release(self, addresses: Iterable[int]) -> None:
        """Free tensors."""
        for address in addresses:
            self.allocator.free(address)

    def play(self, events: StepEvents) -> None:
        """Replay one pass; gradients stay until `optimizer_step`."""
        allocate, free, sizes = self.allocator.allocate, self.allocator.free, events.sizes.tolist()
        addresses = [0] * len(sizes)
        for event in events.order.tolist():
            if event >= 0:
                addresses[event] = allocate(sizes[event])
            else:
                free(addresses[-1 - event])
        self.release(addresses[tensor] for tensor in events.others)
        self._gradients += [addresses[tensor] for tensor in events.gradients]

    def optimizer_step(self, scratch: Iterable[float]) -> None:
        """Replay the optimizer step, then free gradients."""
        self.release(self.keep(scratch) + self._gradients)
        self._gradients = []
