"""Whether it pays that layers run again: asked of the policy at its first decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..allocation.controller import RankController
from ..allocation.goal import TOLERANCE
from ..allocation.observation import Observation
from ..allocation.plan import check_budget
from ..allocation.policy import Decision
from ..errors import BudgetError
from .peak_guard import PeakGuard

Ask = Callable[[Observation], Decision]


def decide(
    guard: PeakGuard,
    controller: RankController[Any],
    ask: Ask,
    note: Callable[[str], None],
    step: int,
    loss: float | None,
    *,
    recomputes: bool,
) -> tuple[Observation, Decision]:
    """Ask a policy for a decision; at the first one, where layers may run again, for two, and take the better one.

    The plan without recomputation takes less time. So it is taken unless the networks expect that the other one's loss
    is lower by more than `TOLERANCE`. A rule expects nothing, and a goal of cost has a cost of its own: there, layers
    run again as the plan needs.

    Args:
        guard: has priced plans for this decision.
        controller: of the run.
        ask: the policy.
        note: tells a line.
        step: optimiser steps done.
        loss: mean training loss since the last decision, if known.
        recomputes: whether layers may run again in this run.

    Returns:
        What was seen, and the decision; plans are priced as they were for it.

    Raises:
        BudgetError: no plan fits.
    """
    observation = controller.observe(step, loss)
    decision = ask(observation)
    gained = _expected(decision)
    if controller.decision or not recomputes or gained is None:
        return observation, decision
    guard.deciding(recomputing=False)
    try:
        check_budget(controller.problem(), list(controller.names))
        without = controller.observe(step, loss)
        other = ask(without)
    except BudgetError:
        guard.deciding()
        return observation, decision
    lost = _expected(other)
    if lost is None or lost - gained > TOLERANCE:
        guard.deciding()
        return observation, decision
    note(
        f"No layer runs again before memory asks for it: that is expected to lower the loss by {lost - gained:.3f} "
        f"(log), and it is worth its time from {TOLERANCE:g} on."
    )
    return without, other


def _expected(decision: Decision) -> float | None:
    """The loss that is expected beside plain LoRA; None of a rule, and under a goal of cost."""
    found = decision.deliberation
    return None if found is None or found.goal.saves else found.loss_beside_plain
