"""A learned policy that aims at another goal than the lowest loss."""

from __future__ import annotations

from dataclasses import replace

from ...allocation.goal import Goal
from ...allocation.policy import Policy
from ...errors import ConfigError
from .policy import LearnedPolicy


def with_goal(policy: Policy, goal: Goal) -> Policy:
    """The policy, aiming at a goal.

    Raises:
        ConfigError: the goal asks for a cheap plan, and the policy is a rule, has no networks that tell plans of any
            cost apart, or draws its plans.
    """
    if not goal.saves:
        return policy
    check_any_cost(policy, f"goal={goal.kind!r}", "use goal='quality'")
    assert isinstance(policy, LearnedPolicy)
    if policy.temperature:
        raise ConfigError(f"{policy.name} draws its plans, which goal={goal.kind!r} cannot: leave `explore` out.")
    return replace(policy, goal=goal)


def check_any_cost(policy: Policy, what: str, instead: str) -> None:
    """Refuse a policy that cannot tell what a cheaper plan would lose.

    Args:
        policy: decides.
        what: needs that, for the error.
        instead: what else can be done.

    Raises:
        ConfigError: the policy is a rule, or its networks do not tell plans of any cost apart.
    """
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        raise ConfigError(
            f"{policy.name} expects nothing of plans, so {what} needs another policy: one with value networks, made by "
            f"`rankpilot train`. Or {instead}."
        )
    if policy.value_ensemble.config.unit != "log loss":
        raise ConfigError(
            f"The networks of {policy.name} compare plans of one cost alone, so {what} needs a policy that was trained "
            f"with plans of any cost (`rankpilot train`). Or {instead}."
        )
