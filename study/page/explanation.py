"""What a page keeps of the explanation of a decision: all but the plans that nobody would look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .curves import plain

MOST_PLANS = 24
"""Plans of one decision that a page shows, those with the highest bounds."""

_KEPT = (
    "verdict", "sentences", "policy", "first", "taken", "reference", "caution", "margin", "unit_of_votes", "actor",
    "shapley", "what_ifs",
)  # fmt: skip


def shown_explanation(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An explanation as the page gets it; None without one.

    A plan's ranks become what a reader asks of them: how many modules are adapted, their mean, and how many differ from
    the plan that was taken. What was asked for and got is in the log.

    Args:
        given: see docs/study.md; any key may be missing or None.
    """
    if not given:
        return None
    kept = {key: plain(given[key]) for key in _KEPT if given.get(key) is not None}
    plans, taken = given.get("plans") or [], given.get("taken")
    if plans:
        kept["plans"] = _best_plans([_shown_plan(plans, index, taken) for index in range(len(plans))], given)
        kept["plans_in_all"] = len(plans)
        shown = {plan["plan"] for plan in kept["plans"]}
        candidates = [candidate for candidate in given.get("candidates") or [] if candidate.get("plan") in shown]
        kept["candidates"] = plain(candidates)
    stability = given.get("stability") or {}
    kept["stability"] = plain({key: stability.get(key) for key in ("same", "noise")}) if stability else None
    return kept


def _shown_plan(plans: list[Mapping[str, Any]], index: int, taken: int | None) -> dict[str, Any]:
    plan = plans[index]
    shown = {key: plain(value) for key, value in plan.items() if key != "ranks"} | {"plan": index}
    ranks = plan.get("ranks")
    if ranks is not None and len(ranks):
        shown |= {"adapted": int(np.count_nonzero(ranks)), "mean_rank": plain(float(np.mean(ranks)))}
        if taken is not None and plans[taken].get("ranks") is not None:
            shown["differs"] = int(np.count_nonzero(np.asarray(ranks) != np.asarray(plans[taken]["ranks"])))
    return shown


def _best_plans(plans: list[dict[str, Any]], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plans with the highest bounds, best first, and always the one that was taken and the reference."""
    ordered = sorted(plans, key=lambda plan: -_bound(plan))
    always = {given.get("taken"), given.get("reference")}
    return [plan for place, plan in enumerate(ordered) if place < MOST_PLANS or plan["plan"] in always]


def _bound(plan: Mapping[str, Any]) -> float:
    value = plan.get("bound")
    return float("-inf") if value is None else float(value)
