"""Hand-written policies: what a learned one starts from and is compared with.

| rule | how it places rank | reads signals |
|---|---|---|
| uniform | one rank on all modules | no |
| top-half, top-third | one rank on all modules of the top layers | no |
| rule16 | one rank on as many top layers as can have rank 16 | no |
| fracrule | rule16 that spends everything: the lowest layer in part | no |
| fracrule-mlp | fracrule, larger modules first | no |
| one-deeper, two-deeper, all-layers | fracrule with a floor of 8, 4 or 1 | no |
| ramp-up, ramp-down | fracrule's layers, ranks that rise or fall fourfold with height | no |
| random | fracrule's floor, random scores | no |
| gradient-norm, adalora, snr | fracrule's layers, ranks by one signal | yes |
| heur3 | fracrule's layers, ranks by the mean of three signals | yes |
| utility-per-byte | heur3 over price | yes |

Rules that read signals decide anew at every decision, and so does fracrule's family, whose scores do not change; plans
are made at the first decision and kept. A new rule is a policy (`allocation/policy.py`) and an entry here.
"""

from __future__ import annotations

from ...allocation.placements import top_down_whole
from ...allocation.plan import uniform_ranks
from ...allocation.policy import Policy
from ...errors import UnknownNameError
from .by_signal import SignalRule, UtilityPerPrice
from .fixed_plan import FixedPlan, Window
from .ramps import Ramp
from .random import RandomScores
from .top_down import LargeModulesFirst, TopDown

__all__ = ["RULES", "SignalRule", "TopDown", "find_rule"]

_RULES: tuple[Policy, ...] = (
    TopDown(),
    SignalRule(),
    FixedPlan("uniform", uniform_ranks),
    FixedPlan("top-half", Window(1 / 2)),
    FixedPlan("top-third", Window(2 / 3)),
    FixedPlan("rule16", top_down_whole),
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
    UtilityPerPrice(),
)
RULES: dict[str, Policy] = {rule.name: rule for rule in _RULES}


def find_rule(name: str) -> Policy:
    """The rule of that name; UnknownNameError if there is none."""
    if name not in RULES:
        raise UnknownNameError.of("rule", name, RULES, "A trained policy is given by its folder.")
    return RULES[name]
