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
from .step_events import StepEvents, step_events

STEPS = 2


@dataclass(frozen=True)
class Replayed:
    """What training takes on a CUDA device, the frozen model included and the context excluded.

    Attributes:
        allocated: bytes of tensors at the peak.
        reserved: bytes that the allocator holds at the end, which it held at the peak.
    """

    allocated: int
    reserved: int


def replay(
    memory: MemoryModel,
    ranks: IntArray,
    loaded: Sequence[int],
    *,
    shape: BatchShape | None = None,
    workspace_bytes: int = 0,
    expandable: bool = False,
) -> Replayed:
    """Replay two steps of a plan.

    Args:
        memory: the byte model.
        ranks: the plan, (modules,).
        loaded: bytes of each storage of the frozen model, in the order of loading.
        shape: of the batches; by default that of calibration.
        workspace_bytes: what cuBLAS takes through the allocator, half of it in each thread.
        expandable: replay with `expandable_segments:True`.

    Raises:
        UnsupportedError: see `MemoryModel.sizes`.
    """
    sizes = memory.sizes_under(ranks, shape)
    events = step_events(memory.recording, sizes, ranks)
    run = _Run(CachingAllocator(expandable=expandable), events, memory.accumulates)
    run.keep(loaded)
    parameters = sizes[list(memory.recording.gradients)]
    run.keep(parameters)
    states = memory.states
    run.keep([states.others, *(states.signals * ranks)])
    for step in range(STEPS):
        for _ in range(1 + memory.accumulates):
            run.forward_and_backward(workspace_bytes if step == 0 else 0)
        if step == 0:
            run.keep(_optimizer_state(memory, parameters, ranks))
        run.optimizer_step(_scratch(memory, parameters))
    return Replayed(run.allocator.peak_allocated, run.allocator.peak_reserved)


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
    """Steps in an allocator."""

    def __init__(self, allocator: CachingAllocator, events: StepEvents, accumulates: bool) -> None:
        self.allocator = allocator
        self._sizes: list[int] = events.sizes.tolist()
        self._order: list[int] = events.order.tolist()
        self._gradients: list[int] = events.gradients.tolist()
        self._others: list[int] = events.others.tolist()
        self._of_gradients: list[int] = []  # addresses

    def keep(self, sizes: Iterable[float]) -> list[int]:
        """Allocate tensors, and return their addresses."""
        return [self.allocator.allocate(int(size)) for size in sizes if size > 0]

    def forward_and_backward(self, workspace_bytes: int) -> None:
        """One pass; gradients stay until `optimizer_step`."""
        allocate, free, sizes = self.allocator.allocate, self.allocator.free, self._sizes
        self.keep([workspace_bytes / 2] * 2)
        addresses = [0] * len(sizes)
        for event in self._order:
            if event >= 0:
                addresses[event] = allocate(sizes[event])
            else:
                free(addresses[-1 - event])
        for tensor in self._others:
            free(addresses[tensor])
        for tensor in self._gradients:
            if len(self._of_gradients) < len(self._gradients):
                self._of_gradients.append(addresses[tensor])
            else:  # it was added to those of the batch before
                free(addresses[tensor])

    def optimizer_step(self, scratch: Iterable[float]) -> None:
        """The optimiser's step; then gradients are freed."""
        for address in self.keep(scratch) + self._of_gradients:
            self.allocator.free(address)
        self._of_gradients = []
