"""What torch's allocator reserves for a plan: two training steps, replayed through a model of it.

The first step warms up: libraries take their workspaces and the optimiser its state. The second one runs beside these,
in segments that the first one has cut up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray, IntArray
from .batch_shape import BatchShape
from .caching_allocator import CachingAllocator
from .model import MemoryModel
from .step_events import StepEvents, evaluation_events, step_events

STEPS = 2


@dataclass(frozen=True)
class Replayed:
    """What training takes on a CUDA device, the frozen model included and the context excluded.

    Attributes:
        allocated: bytes of tensors at the peak of the training steps.
        evaluation: bytes of tensors at the peak of evaluation; 0 if there is none.
        reserved: bytes that the allocator holds at the most.
    """

    allocated: int
    evaluation: int
    reserved: int


def replay(
    memory: MemoryModel,
    ranks: IntArray,
    loaded: Sequence[int],
    *,
    shape: BatchShape | None = None,
    evaluation: BatchShape | None = None,
    workspace_bytes: int = 0,
) -> Replayed:
    """Replay two steps of a plan.

    Args:
        memory: the byte model.
        ranks: the plan, (modules,).
        loaded: bytes of each storage of the frozen model, in the order of loading.
        shape: of the batches; by default that of calibration.
        evaluation: the shape of batches of an evaluation after the steps, a forward pass without a graph; None for
            none.
        workspace_bytes: what cuBLAS takes through the allocator, half of it in each thread.

    Raises:
        UnsupportedError: see `MemoryModel.sizes`.
    """
    sizes = memory.sizes_under(ranks, shape)
    run = _Run(CachingAllocator())
    run.keep(loaded)
    parameters = sizes[list(memory.recording.gradients)]
    run.keep(parameters)
    states = memory.states
    run.keep([states.others, *((states.signals + states.buckets) * ranks)])
    recordings = [memory.recording, *([memory.recording.accumulating()] if memory.accumulates else [])]
    batches = [step_events(recording, sizes, ranks) for recording in recordings]
    run.keep([workspace_bytes / 2] * 2)
    for step in range(STEPS):
        for events in batches:
            run.play(events)
        if step == 0:
            run.keep(_optimizer_state(memory, parameters, ranks))
        run.optimizer_step(_scratch(memory, parameters))
    allocated = run.allocator.restart_peak()
    run.allocator.empty_cache()  # as the allocator does by itself before it runs out of memory
    if evaluation:
        run.play(evaluation_events(memory.recording, memory.sizes_under(ranks, evaluation)))
    after = run.allocator.peak_allocated if evaluation else 0
    return Replayed(allocated, after, run.allocator.peak_reserved)


def _optimizer_state(memory: MemoryModel, parameters: FloatArray, ranks: IntArray) -> list[float]:
    """Bytes of the optimiser's tensors: taken to be two of the same size for each factor of an adapter."""
    states = memory.states
    return [*np.repeat(_of_factors(memory, parameters, states.optimizer) / 2, 2), *(states.fixed * (ranks > 0))]


def _scratch(memory: MemoryModel, parameters: FloatArray) -> list[float]:
    """Bytes of what the optimiser takes for the time of its step."""
    states = memory.states
    return [states.other_gradients, *_of_factors(memory, parameters, states.scratch)]


def _of_factors(memory: MemoryModel, parameters: FloatArray, per_rank: FloatArray) -> FloatArray:
    """Bytes of each module's rank, (modules,), shared out among its factors as their weights are, (parameters,)."""
    modules = np.array(list(memory.recording.gradients.values()), dtype=np.int64)
    return np.where(modules >= 0, parameters * (per_rank / memory.states.weights)[modules], 0.0)


class _Run:
    """Passes in an allocator."""

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
        """One pass; gradients stay until `optimizer_step`."""
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
        """The optimiser's step; then gradients are freed."""
        self.release(self.keep(scratch) + self._gradients)
        self._gradients = []
