"""What the guard of the budget costs: measured steps beside plain ones, and the look at each batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...allocation.placements import top_down, top_layers
from ...allocation.problem import AllocationProblem
from ...common.arrays import IntArray
from ...lora.ladder import REFERENCE_RANK
from ...lora.targets import TargetModule
from ...memory import resident
from ...memory.batch_shape import BatchShape
from ...memory.cost import Cost, plan_cost
from ...memory.recording import Batch
from ..harness import estimate_cycles, interleave, paired_ratios, usual_step
from ..models import Family, Size
from .resident import large_learner, observe

REFERENCE = f"all-linear, rank {REFERENCE_RANK}"
TOP_HALF, HALF_BUDGET = "top half, rank 16", "top-down at 50 %"
PLANS = (REFERENCE, TOP_HALF, HALF_BUDGET)
"""Plans that are looked at from outside the process."""


def measured_steps(family: Family, size: Size, device: torch.device, seed: int, rounds: int) -> dict[str, Any]:
    """Time steps under `PeakMeter` and plain ones in turn.

    Returns:
        "step_ratio" (value, low, high) of a measured step, and "look_share" of a plain step that the callback's
        look at its batch takes.
    """
    learner, batch = large_learner(family, size, device, seed)
    learner.step(batch)

    work = {"plain": lambda turn: learner.step(batch), "measured": lambda turn: learner.measured_step(batch)}
    seconds = interleave(work, rounds, device)
    ratio = estimate_cycles(paired_ratios(seconds["measured"], seconds["plain"], 1), usual_step)
    share = _look_seconds(batch) / float(np.median(seconds["plain"]))
    return {"step_ratio": [ratio.value, ratio.low, ratio.high], "look_share": share}


def _look_seconds(batch: Batch) -> float:
    """What the callback's look at a batch takes, which every step carries."""
    shape, calls = BatchShape.of(batch), 1000
    start = time.perf_counter()
    for _ in range(calls):
        shape.joined(BatchShape.of(batch))
    return (time.perf_counter() - start) / calls


def named_plans(targets: Sequence[TargetModule], cost: Cost, layers: int) -> dict[str, IntArray]:
    """Ranks of each of `PLANS`, int64 (modules,).

    Args:
        targets: target modules of the model.
        cost: of a plan.
        layers: transformer layers of the model; what stands above them, such as a pooler, goes with the top one.
    """
    everything = AllocationProblem.of(targets, cost, float("inf"))
    reference = everything.uniform(REFERENCE_RANK)
    above = int(everything.blocks.max()) + 1 - layers
    half_budget = AllocationProblem.of(targets, cost, 0.5 * plan_cost(cost, reference))
    return {
        REFERENCE: reference,
        TOP_HALF: top_layers(everything, round(layers / 2) + above, 16),
        HALF_BUDGET: top_down(half_budget),
    }


def outside_view(
    family: Family, size: Size, device: torch.device, seed: int, plans: tuple[str, ...] = PLANS
) -> dict[str, Any]:
    """What the operating system or CUDA's allocator reports of single steps, beside the prediction.

    Returns:
        By plan "predicted" bytes, and those of `resident.observe`; no plan where nothing can be read.
    """
    if device.type != "cuda" and not resident.can_reset_peak():
        return {}
    learner, batch = large_learner(family, size, device, seed)
    learner.step(batch)
    cost = learner.calibrate(batch).cost()
    named = named_plans(learner.targets, cost, size.layers)
    seen = {}
    for name in plans:
        ranks = named[name]
        seen[name] = {"predicted": plan_cost(cost, ranks)} | observe(family, size, ranks.tolist(), device, seed)
    return seen
