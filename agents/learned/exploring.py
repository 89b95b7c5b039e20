"""A learned policy that draws its plans, so that its log can tell what other policies would have been worth."""

from __future__ import annotations

import math
from dataclasses import replace

from ...allocation.policy import Policy
from ...errors import ConfigError
from .policy import LearnedPolicy


def exploring(policy: Policy, temperature: float | str, seed: int = 0) -> LearnedPolicy:
    """The policy, drawing from a softmax over the lower bounds of its plans.

    At .05 the plan that the policy prefers is drawn a third of the time, and a draw costs .025 in the unit of the
    bounds; at .1 it costs .064 (docs/experiments.md).

    Args:
        policy: a learned policy with a value ensemble.
        temperature: see `LearnedPolicy`, > 0.
        seed: with the observation it decides what is drawn.

    Raises:
        ConfigError: the temperature is no number above 0, or the policy has no value ensemble.
    """
    try:
        value = float(temperature)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"Exploration takes a temperature above 0, in the unit of the votes, such as 0.05; got {temperature!r}."
        )
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        raise ConfigError(f"{policy.name} has no value ensemble, so there is nothing to draw plans by.")
    return replace(policy, name=f"{policy.name} exploring at {value:g}", temperature=value, seed=seed)


def drawing_from(policy: Policy, seed: int) -> Policy:
    """A policy that explores with another seed of what it draws; any other policy as it is.

    Args:
        policy: any.
        seed: see `exploring`.
    """
    return replace(policy, seed=seed) if isinstance(policy, LearnedPolicy) and policy.temperature else policy
