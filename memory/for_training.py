"""Prices of plans for a training loop, and its budget in the same unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from ..lora.signals import signal_buffer_bytes
from ..lora.targets import TargetModule
from .budget import Budget, Limit
from .calibration import calibrate
from .cost import Cost, ParameterCost
from .model import MemoryModel
from .recording import Batch

LOOP_BYTES = 1024
"""Room for the few scalars that a training loop adds to the graph, such as a loss divided by a token count."""


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """What plans may cost.

    Attributes:
        cost: price of a plan.
        limit: what a plan may cost at most.
        memory: predicts other batch shapes; None under a budget of parameters.
    """

    cost: Cost
    limit: Limit
    memory: MemoryModel | None


def measure_memory(
    targets: Sequence[TargetModule],
    model: nn.Module,
    batch: Batch,
    optimizer: Any,
    *,
    signals: bool,
    accumulates: bool,
) -> MemoryModel:
    """`calibrate` for a training loop, with room for the scalars that it adds."""
    memory = calibrate(model, targets, batch, optimizer, signal_bytes=signals, accumulates=accumulates)
    return replace(memory, states=replace(memory.states, others=memory.states.others + LOOP_BYTES))


def price_plans(
    budget: Budget,
    targets: Sequence[TargetModule],
    model: nn.Module,
    batch: Batch,
    optimizer: Any,
    *,
    signals: bool = True,
    accumulates: bool = False,
) -> PlanCosts:
    """The price of plans on this model and batch, and the limit in the same unit.

    A share is a share of what *plain* LoRA of uniform rank 8 takes, without our signal buffers.

    Args:
        budget: the limit.
        targets: target modules of the model.
        model: the PEFT model, on its device.
        batch: as large as the largest that training will see.
        optimizer: decides the bytes of state.
        signals: whether plans pay for signal buffers.
        accumulates: whether gradients are kept over several micro-batches.
    """
    device = targets[0].weight_a.device
    max_ranks = np.array([target.max_rank for target in targets], dtype=np.int64)
    if budget.kind == "parameters":
        counted = ParameterCost.of(targets)
        return PlanCosts(counted, budget.resolve(counted, max_ranks, device), None)
    memory = measure_memory(targets, model, batch, optimizer, signals=False, accumulates=accumulates)
    # "auto" reads the free memory here: by now, libraries have taken the memory that they need to compute.
    limit = budget.resolve(memory.cost(), max_ranks, device)
    if signals:
        memory = replace(memory, states=replace(memory.states, signals=signal_buffer_bytes(targets)))
    return PlanCosts(memory.cost(), limit, memory)
