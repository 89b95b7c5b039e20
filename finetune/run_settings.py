"""The settings of a run that a resumed run is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..allocation.bounds import Bounds
from ..allocation.policy import Policy
from ..allocation.schedule import DecisionSchedule
from ..errors import RunFolderError
from ..memory.budget import Budget
from ..memory.time_budget import TimeBudget

MAY_CHANGE = ("budget", "time")


def run_settings(
    budget: Budget,
    time: TimeBudget | None,
    policy: Policy,
    schedule: DecisionSchedule,
    bounds: Bounds,
    recompute: bool,
    scaling: str,
) -> dict[str, Any]:
    """What a resumed run is held against, as JSON values."""
    return {
        "budget": str(budget),
        "time": None if time is None else str(time),
        **policy_settings(policy),
        "schedule": repr(schedule),
        "bounds": {name: list(bound) if isinstance(bound, tuple) else bound for name, bound in bounds.items()},
        "recompute": recompute,
        "scaling": scaling,
    }


def policy_settings(policy: Policy) -> dict[str, Any]:
    """Those that tell which policy decides."""
    goal = getattr(policy, "goal", None)  # of learned policies alone, as the sha256
    return {
        "policy": policy.name,
        "policy_sha256": getattr(policy, "sha256", None),
        "goal": str(goal) if goal and goal.saves else None,
    }


def check_same(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise RunFolderError if a run is resumed with settings of another run; its budget and time may be others."""
    differing = [key for key in now if key not in MAY_CHANGE and now[key] != before.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now[key]!r} now" for key in differing)
        raise RunFolderError(
            f"The run that is resumed had other settings ({shown}). Resume with those, or start a new run; only "
            "the budget and the time may change."
        )


def changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """For people, which limits have changed; nothing if none has."""
    differing = [key for key in MAY_CHANGE if now[key] != before.get(key)]
    return "; ".join(f"the {key} is {now[key] or 'none'} now, and was {before.get(key) or 'none'}" for key in differing)
