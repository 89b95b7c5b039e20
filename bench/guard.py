"""What the guard of the budget costs: measured steps beside plain ones, and the look at each batch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ..lora.cost import total_cost
from ..lora.shape import Shape
from .harness import bootstrap, interleave, paired_ratios, usual_step
from .models import Family, Size
from .plans import REFERENCE, named_plans
from .resident import is_supported, large_learner, observe

PLANS = (REFERENCE, "top half, rank 16", "fracrule at 50 %")


def measured_steps(family: Family, size: Size, rounds: int, device: torch.device, seed: int) -> dict[str, Any]:
    """Time steps under `PeakMeter` and plain ones in turn.

    Returns:
        "step_ratio" (value, low, high) of a measured step, and "shape_check_share" of a plain step that reading and
        comparing the shape of its batch takes.
    """
    learner, batch = large_learner(family, size, device, seed)
    learner.step(batch)
    known = Shape.of(batch)

    def plain(turn: int) -> None:
        learner.step(batch)

    def measured(turn: int) -> None:
        learner.measured_step(batch)

    seconds = interleave({"plain": plain, "measured": measured}, rounds, device)
    ratio = bootstrap(paired_ratios(seconds["measured"], seconds["plain"], 1), usual_step)
    checks, start = 100, time.perf_counter()
    for _ in range(checks):
        known.covers(Shape.of(batch))
    check_s = (time.perf_counter() - start) / checks
    share = check_s / float(np.median(seconds["plain"]))
    return {"step_ratio": [ratio.value, ratio.low, ratio.high], "shape_check_share": share}


def outside_view(
    family: Family, size: Size, device: torch.device, seed: int, plans: tuple[str, ...] = PLANS
) -> dict[str, Any]:
    """What the operating system or CUDA's allocator says of single steps, beside the prediction.

    Returns:
        By plan "predicted" bytes, and those that `resident.observe` tells; no plan where nothing can be read.
    """
    if not is_supported(device):
        return {}
    learner, batch = large_learner(family, size, device, seed)
    learner.step(batch)
    cost = learner.calibrate(batch).cost()
    named = named_plans(learner.targets, cost, size.layers)
    seen = {}
    for name in plans:
        ranks = named[name].ranks
        seen[name] = {"predicted": total_cost(cost, ranks)} | observe(family, size, ranks.tolist(), device, seed)
    return seen
