"""Which layers run again in the backward pass: as few as the bytes of a plan need.

A layer that runs again (gradient checkpointing; Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016)
holds its inputs alone, and takes the time of its forward pass twice. What the lowest layers hold is there until the
end of the backward pass, so recomputing them lowers memory at every moment. What an upper layer would hold is back as
soon as it runs again, on top of all that the layers below it hold: so layers are taken from the lowest upwards.
"""

from __future__ import annotations

from bisect import bisect_left

from ..common.arrays import IntArray
from .batch_shape import BatchShape
from .model import MemoryModel


def fewest_recomputed(
    memory: MemoryModel, ranks: IntArray, limit: float, shape: BatchShape | None = None
) -> tuple[str, ...]:
    """The fewest layers that must run again so that a plan fits.

    Args:
        memory: the byte model of a step in which every layer runs again.
        ranks: the plan, int64 (modules,).
        limit: bytes that the step may take.
        shape: of the batch; by default that of calibration.

    Returns:
        Names of layers, the lowest first, without those that hold nothing for the backward pass under this plan. All
        that hold something, if the plan does not even fit then.
    """
    layers = holding_layers(memory, ranks)

    def fits(count: int) -> bool:
        return memory.recomputing(layers[:count]).peak(ranks, shape) <= limit

    if not layers or fits(0):
        return ()
    if not fits(len(layers)):
        return layers
    return layers[: bisect_left(range(len(layers)), True, lo=1, key=fits)]


def holding_layers(memory: MemoryModel, ranks: IntArray) -> tuple[str, ...]:
    """Names of the layers that hold something for backward under a plan, int64 (modules,), the lowest first."""
    adapted = sum(1 << int(module) for module in ranks.nonzero()[0]) | 1 << len(ranks)
    holding = [segment.name for segment in memory.segments if any(m & adapted for m in segment.saved.values())]
    return tuple(dict.fromkeys(holding))
