"""Decisions in words, for a console, a log file or a page."""

from __future__ import annotations

import numpy as np

from ..common.arrays import IntArray
from ..common.units import part_of, plural
from .deliberation import Deliberation
from .features import run_feature_number, run_feature_text
from .goal import TOLERANCE, improvement_of

PLAIN = "rank 8 on all modules"
"""Plain LoRA, with which plans are compared, in words."""


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


def unlike(found: Deliberation) -> str:
    """In what a run is unlike those that the networks have learned from; empty where it is not."""
    features = (
        run_feature_text(name, value) + f" (not {run_feature_number(name, low)} to {run_feature_number(name, high)})"
        for name, (value, low, high) in found.outside.items()
    )
    return ", ".join([*(["adapters that are trained already"] if found.trained else []), *features])


def promise(found: Deliberation) -> str:
    """What is expected of the plan that is taken beside plain LoRA; empty where nothing is known."""
    loss = found.loss_beside_plain
    if loss is None or found.plain is None:
        return ""
    allowed = f"{found.goal.tolerance:.2g} (log)"
    if not found.goal.saves:
        fits = "" if found.may_take[found.plain] else ", which does not fit"
        known = found.plan != found.plain and not found.trained
        return f"Expected beside {PLAIN}{fits}: log loss {loss:+.3f}." if known else ""
    if found.misses_goal:
        return (
            f"The goal cannot be kept: {PLAIN} does not fit the budget, and no plan that fits surely stays "
            f"within {allowed} of its loss. A larger budget, time or tolerance helps."
        )
    if found.plan == found.reference:
        broad = "broad " if found.narrow.any() else ""
        return f"No cheaper {broad}plan surely stays within {allowed} of the loss of {PLAIN}, so it is {PLAIN}."
    if found.trained:
        return ""
    mean, worst = (
        0.0 - improvement_of(vote) for vote in (found.mean[found.plan], (found.mean - found.reach)[found.plan])
    )
    return f"Expected beside {PLAIN}: log loss {mean:+.3f}, surely at most {worst:+.3f}."


def lacks_room(found: Deliberation) -> bool:
    """Whether much is lost under a goal of quality because plain LoRA does not fit, as far as the networks can know.

    In a run unlike those that they have learned from, they do not know it.
    """
    loss = found.loss_beside_plain
    if loss is None or found.plain is None or found.goal.saves or unlike(found):
        return False
    return not found.may_take[found.plain] and loss > TOLERANCE
