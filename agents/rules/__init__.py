"""Rules: hand-written policies, from which a learned one starts and with which it is compared.

| rule | its plan | reads signals |
|---|---|---|
| uniform | one rank on as many top layers as can have rank 8 (rank 1 under a budget of parameters) | no |
| top-half | one rank on the top half of the layers | no |
| top-down | one rank on as many top layers as can have rank 16, and on some modules of the next one | no |
| random | random scores, the rank floor of top-down | no |
| gradient-norm | the modules of top-down, ranks by one signal | yes |
| signal-mean | the modules of top-down, ranks by the mean of three signals | yes |

Rules that read signals make a new plan at every decision. So does top-down, but from the same scores. The others keep
the plan of the first decision. A new rule is a policy (`allocation/policy.py`) and an entry here. A plan that a person
wrote is a policy too: `given_plan.PlanFile`.
"""

from __future__ import annotations

from ...allocation.plan import uniform_ranks
from ...allocation.policy import Policy
from ...errors import UnknownNameError
from .hand_written import MEAN_SIGNALS, FixedPlan, RandomScores, SignalRule, TopDown, Window, signal_mean

__all__ = [
    "MEAN_SIGNALS",
    "RULES",
    "FixedPlan",
    "RandomScores",
    "SignalRule",
    "TopDown",
    "Window",
    "find_rule",
    "signal_mean",
]

_RULES: tuple[Policy, ...] = (
    TopDown(),
    SignalRule(),
    FixedPlan("uniform", uniform_ranks),
    FixedPlan("top-half", Window(1 / 2)),
    RandomScores(),
    SignalRule("gradient-norm", signals=("gradient_norm",)),
)
RULES: dict[str, Policy] = {rule.name: rule for rule in _RULES}


def find_rule(name: str) -> Policy:
    """The rule of that name; UnknownNameError if there is none."""
    if name not in RULES:
        raise UnknownNameError.of(
            "rule", name, RULES, "A trained policy is given by its folder, a plan by its .yaml file."
        )
    return RULES[name]
