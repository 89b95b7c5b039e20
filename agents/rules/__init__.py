"""Rules: hand-written policies, from which a learned one starts and with which it is compared.

| rule | its plan | reads signals |
|---|---|---|
| uniform | one rank on as many top layers as can have rank 8 (rank 1 under a budget of parameters) | no |
| uniform-16, uniform-32 | the same for rank 16 or 32, under any budget | no |
| top-half, top-third | one rank on the top half or third of the layers | no |
| top-down | as uniform-16, with some modules of the next layer down, and nothing left unspent | no |
| top-down-mlp | as top-down, with more rank for larger modules | no |
| one-deeper, two-deeper, all-layers | as top-down, with a rank floor of 8, 4 or 1 | no |
| ramp-up, ramp-down | the modules of top-down, ranks that rise or fall fourfold from bottom to top | no |
| random | random scores, the rank floor of top-down | no |
| gradient-norm, adalora, snr | the modules of top-down, ranks by one signal | yes |
| signal-mean | the modules of top-down, ranks by the mean of three signals | yes |
| utility-per-byte | as signal-mean, relative to what a rank costs | yes |

Rules that read signals make a new plan at every decision. So do top-down and its variants, but from the same scores.
The others keep the plan of the first decision. A new rule is a policy (`allocation/policy.py`) and an entry here.
"""

from __future__ import annotations

from functools import partial

from ...allocation.plan import uniform_ranks
from ...allocation.policy import Policy
from ...errors import UnknownNameError
from .by_signal import SignalRule, UtilityPerCost
from .fixed_plan import FixedPlan, Window
from .ramps import Ramp
from .random import RandomScores
from .top_down import LargeModulesFirst, TopDown

__all__ = ["EARLIER_NAMES", "RULES", "SignalRule", "TopDown", "find_rule"]

_RULES: tuple[Policy, ...] = (
    TopDown(),
    SignalRule(),
    FixedPlan("uniform", uniform_ranks),
    *(FixedPlan(f"uniform-{rank}", partial(uniform_ranks, least_rank=rank)) for rank in (16, 32)),
    FixedPlan("top-half", Window(1 / 2)),
    FixedPlan("top-third", Window(2 / 3)),
    LargeModulesFirst(),
    TopDown("one-deeper", -1.0),
    TopDown("two-deeper", -2.0),
    TopDown("all-layers", -4.0),
    Ramp(),
    Ramp("ramp-down", 1 / 4),
    RandomScores(),
    SignalRule("gradient-norm", signals=("gradient_norm",)),
    SignalRule("adalora", signals=("importance",)),
    SignalRule("snr", signals=("snr",)),
    UtilityPerCost(),
)
RULES: dict[str, Policy] = {rule.name: rule for rule in _RULES}


EARLIER_NAMES = {
    "fracrule": "top-down",
    "fracrule-mlp": "top-down-mlp",
    "heur3": "signal-mean",
    "rule16": "uniform-16",
    "top-down-whole": "uniform-16",
}
"""Names that rules had in earlier versions, which people and files may still use."""


def find_rule(name: str) -> Policy:
    """The rule of that name, or of that earlier name; UnknownNameError if there is none."""
    name = EARLIER_NAMES.get(name, name)
    if name not in RULES:
        raise UnknownNameError.of("rule", name, RULES, "A trained policy is given by its folder.")
    return RULES[name]
