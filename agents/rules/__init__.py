"""Hand-written policies: what a learned one starts from and is compared with.

| rule | how it places rank | reads signals |
|---|---|---|
| uniform | one rank on all modules | no |
| top-half, top-third | one rank on all modules of the top layers | no |
| top-down-whole | one rank on as many top layers as can have rank 16 | no |
| top-down | top-down-whole that spends everything: the lowest layer in part | no |
| top-down-mlp | top-down, larger modules first | no |
| one-deeper, two-deeper, all-layers | top-down with a floor of 8, 4 or 1 | no |
| ramp-up, ramp-down | top-down's layers, ranks that rise or fall fourfold with height | no |
| random | top-down's floor, random scores | no |
| gradient-norm, adalora, snr | top-down's layers, ranks by one signal | yes |
| signal-mean | top-down's layers, ranks by the mean of three signals | yes |
| utility-per-byte | signal-mean over the cost of a rank | yes |

Rules that read signals decide anew at every decision, and so does top-down's family, whose scores do not change; plans
are made at the first decision and kept. A new rule is a policy (`allocation/policy.py`) and an entry here.
"""

from __future__ import annotations

from ...allocation.placements import top_down_whole
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
    FixedPlan("top-half", Window(1 / 2)),
    FixedPlan("top-third", Window(2 / 3)),
    FixedPlan("top-down-whole", top_down_whole),
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
    "rule16": "top-down-whole",
}
"""Names that rules had in earlier versions, which people and files may still use."""


def find_rule(name: str) -> Policy:
    """The rule of that name, or of that earlier name; UnknownNameError if there is none."""
    name = EARLIER_NAMES.get(name, name)
    if name not in RULES:
        raise UnknownNameError.of("rule", name, RULES, "A trained policy is given by its folder.")
    return RULES[name]
