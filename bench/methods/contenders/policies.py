"""Policies inside the benchmark: by name, without some features, within bounds; what identifies them in rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ....agents.evaluation.ablation import Without
from ....agents.learned.policy import LearnedPolicy
from ....agents.learned.policy_file import load_policy, policy_folder, policy_schedule, read_card
from ....allocation.broad_plans import LEAST_LAYERS, LEAST_MODULES, LEAST_THICK
from ....allocation.policy import Policy
from ....allocation.schedule import DecisionSchedule

WITHOUT = " without "
"""Between a policy and the group of features that it does not see: "default without signals"."""


def load(spec: str) -> Policy:
    """A policy by name or folder, perhaps without a group of features."""
    name, _, hidden = spec.partition(WITHOUT)
    policy = load_policy(name)
    return Without(policy, (hidden,)) if hidden else policy


def schedule(spec: str) -> DecisionSchedule:
    """When it decides."""
    return policy_schedule(spec.partition(WITHOUT)[0])


@lru_cache(maxsize=16)
def identity(spec: str, *, saves: bool = False) -> dict[str, Any]:
    """Arguments of work that tell a policy, a learned one by its weights.

    Args:
        spec: see `load`.
        saves: whether it has a goal of cost, for which its doubt and the floor of broad plans count as well.
    """
    name = spec.partition(WITHOUT)[0]
    if not isinstance(load_policy(name), LearnedPolicy):
        return {"policy": spec}
    card = read_card(policy_folder(name))
    found = {"policy": spec, "sha": str(card["sha256"])[:16]}
    if saves and card.get("plan_value"):
        doubts = [card["plan_value"].get(key) for key in ("doubt", "doubt_on_labels")]
        found["doubt"] = " ".join(f"{doubt:.3g}" for doubt in doubts if doubt is not None)
        found["broad"] = " ".join(f"{share:.3g}" for share in (LEAST_MODULES, LEAST_LAYERS, LEAST_THICK))
    return found
