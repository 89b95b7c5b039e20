"""Which layers run again in the backward pass: as few as the bytes of a plan need.

A layer that runs again (gradient checkpointing; Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016)
holds its inputs alone, and takes the time of its forward pass twice. What the lowest layers hold is there until the
end of the backward pass, so recomputing them lowers memory at every moment. What an upper layer would hold is back as
soon as it runs again, on top of all that the layers below it hold: so layers are taken from the lowest upwards.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ..common.arrays import IntArray
from .autograd_flow import adapted_modules
from .batch_shape import BatchShape
from .cost import ByteCost, plan_cost
from .model import MemoryModel

FREE_RANK = 32
"""On all modules it may take the bytes that recomputation saves. On small models a higher one gains .1 % of the loss,
and rank 8 loses 1.2 to 1.9 % (docs/experiments.md); beside what layers hold in large ones, either takes few bytes."""


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


def recomputed_cost(
    memory: MemoryModel, max_ranks: IntArray, limit: float, shape: BatchShape | None = None
) -> ByteCost:
    """What plans cost where layers may run again: a budget buys less recomputation before it buys more rank.

    A plan must fit with all layers running again. And without any, it may take what `FREE_RANK` on all modules takes,
    or the limit if that is more: else every plan would spend all that recomputation saves on ranks, and every layer
    would run again.

    Args:
        memory: the byte model of a step in which every layer runs again.
        max_ranks: the highest rank of each module, int64 (modules,).
        limit: bytes that the step may take. Costs without recomputation are scaled, so that it limits them too.
        shape: of the batch; by default that of calibration.
    """
    every, none = memory.cost(shape), memory.recomputing(()).cost(shape)
    factor = limit / max(limit, plan_cost(none, np.minimum(FREE_RANK, max_ranks)))
    groups = [np.pad(every.group_bytes, ((0, 0), (0, len(none.needs))))]
    groups.append(np.pad(np.ceil(factor * none.group_bytes), ((0, 0), (len(every.needs), 0))))
    return ByteCost(
        moments=(*every.moments, *(f"{moment}, with no layer run again" for moment in none.moments)),
        constant=np.concatenate([every.constant, np.ceil(factor * none.constant)]),
        per_rank=np.concatenate([every.per_rank, np.ceil(factor * none.per_rank)]),
        group_bytes=np.concatenate(groups),
        needs=np.concatenate([every.needs, none.needs]),
    )


def holding_layers(memory: MemoryModel, ranks: IntArray) -> tuple[str, ...]:
    """Names of the layers that hold something for backward under a plan, int64 (modules,), the lowest first."""
    adapted = adapted_modules(ranks)
    holding = [segment.name for segment in memory.segments if any(m & adapted for m in segment.saved.values())]
    return tuple(dict.fromkeys(holding))
