"""From a training step to the limit of its plans: byte model, cost of a plan, budget in the same unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..common.arrays import IntArray
from ..errors import ConfigError
from ..lora.signals import signal_buffer_bytes
from ..lora.targets import TargetModule
from .budget import Budget, Limit
from .calibration import calibrate
from .cost import ParameterCost, UntimedCost
from .model import MemoryModel
from .model_states import with_buckets
from .recomputation import recomputed_cost
from .recording import Batch
from .training_step import TrainingStep

LOOP_BYTES = 1024
"""Room for the few scalars that a training loop adds to the graph, such as a loss divided by a token count."""


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """What plans cost, and their limit; `memory`, None under a budget of parameters, predicts other batch shapes."""

    cost: UntimedCost
    limit: Limit
    memory: MemoryModel | None


def measure_memory(step: TrainingStep, targets: Sequence[TargetModule], batch: Batch, *, signals: bool) -> MemoryModel:
    """The byte model of a training loop's step: `calibrate`, with the scalars and the buckets that the loop adds.

    Takes batches as `calibrate` does and raises its errors; with `signals`, plans pay for signal buffers.
    """
    memory = calibrate(
        step.model,
        targets,
        batch,
        step.optimizer,
        loss=step.loss,
        rows_per_example=step.rows_per_example,
        signal_bytes=signals,
        accumulates=step.accumulates,
    )
    states = replace(memory.states, others=memory.states.others + LOOP_BYTES)
    return replace(memory, states=with_buckets(states, step.model, targets, step.bucket_copies))


def plan_costs(
    budget: Budget,
    step: TrainingStep,
    targets: Sequence[TargetModule],
    batch: Batch,
    *,
    signals: bool,
    recompute: bool = False,
    kept: IntArray | None = None,
) -> PlanCosts:
    """What plans cost in this step, on its largest batch, and the limit that a budget sets them.

    A share is a share of what *plain* LoRA takes, rank 8 on all modules, without signal buffers. With `recompute`,
    layers may run again in the backward pass, as all do in the step as it is set: plans cost what `recomputed_cost`
    says, and a share is one of what plain LoRA takes where none does. Under a budget of parameters nothing is measured.
    See `Budget.resolve` for `kept`, and `measure_memory` for the other arguments.
    """
    if budget.kind == "parameters":
        return PlanCosts(*limited_cost(budget, targets, None, kept), None)
    memory = measure_memory(step, targets, batch, signals=False)
    plainly = memory.recomputing(()) if recompute else memory
    cost, limit = limited_cost(budget.beside(step.model), targets, plainly, kept)
    if signals:
        memory = replace(memory, states=replace(memory.states, signals=signal_buffer_bytes(targets)))
    if recompute:
        cost = recomputed_cost(memory, highest_ranks(targets), limit.value)
    elif signals:
        cost = memory.cost()
    return PlanCosts(cost, limit, memory)


def limited_cost(
    budget: Budget, targets: Sequence[TargetModule], memory: MemoryModel | None, kept: IntArray | None = None
) -> tuple[UntimedCost, Limit]:
    """The cost that a budget limits, and its limit.

    A budget of "total" bytes comes as what is left of it (`Budget.beside`). `memory` is the byte model without signal
    buffers; None only under a budget of parameters. See `Budget.resolve` for `kept`.
    """
    cost: UntimedCost = ParameterCost.of(targets) if budget.kind == "parameters" or memory is None else memory.cost()
    # "auto" reads the free memory here: by now, libraries have taken the memory that they need to compute.
    return cost, budget.resolve(cost, highest_ranks(targets), targets[0].weight_a.device, kept)


def highest_ranks(targets: Sequence[TargetModule]) -> IntArray:
    """The highest rank that each module can have, int64 (modules,)."""
    return np.array([target.max_rank for target in targets], dtype=np.int64)


def check_rank(rank: int, targets: Sequence[TargetModule]) -> None:
    """Raise ConfigError for a rank that none of the modules can have."""
    widest = max(target.max_rank for target in targets)
    if rank > widest:
        raise ConfigError(f"No module has a rank above {widest}, the smaller width of the widest; got {rank}.")
