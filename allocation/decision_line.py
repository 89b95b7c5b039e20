"""A decision in one line, for a console, a log file or a report."""

from __future__ import annotations

import numpy as np

from ..common.arrays import IntArray
from ..common.units import part_of, plural


def decision_line(step: int, before: IntArray, after: IntArray, cost: float, limit: float, unit: str) -> str:
    """A decision in one line: "step 28: 9 modules moved, 12.1 of 12.3 GiB, mean rank 9.4".

    Args:
        step: optimiser steps done before the decision.
        before: ranks before it, int (modules,).
        after: ranks of the plan, int (modules,). Their mean counts modules without an adapter as rank 0.
        cost: predicted cost of the plan.
        limit: the budget.
        unit: of both: "bytes" or "parameters".
    """
    count = int(np.count_nonzero(np.asarray(before) != np.asarray(after)))
    moved = f"{plural(count, 'module')} moved" if count else "no module moved"
    return f"step {step}: {moved}, {part_of(cost, limit, unit)}, mean rank {np.mean(after):.1f}"
