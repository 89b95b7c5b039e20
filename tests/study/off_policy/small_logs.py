"""Small logs, whose estimates can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from rankpilot.study.off_policy.logged import LoggedChoices
from rankpilot.study.off_policy.targets import TargetPolicy

PAIRS = 8
"""Of each log: as many times the two decisions below, each of a task of its own."""


def pairs(pairs: int = PAIRS) -> LoggedChoices:
    """Two kinds of decisions in turn.

    * two plans, of which the first (probability .8) gave 1; 0.5 and 2 were predicted;
    * three plans, of which the second (probability .5) gave 3; 1, 2 and 0 were predicted.
    """
    return LoggedChoices(
        tasks=range(2 * pairs),
        plans=np.tile([2, 3], pairs),
        chosen=np.tile([0, 1], pairs),
        outcomes=np.tile([1.0, 3.0], pairs),
        probabilities=np.tile([0.8, 0.2, 0.4, 0.5, 0.1], pairs),
        predictions=np.tile([0.5, 2.0, 1.0, 2.0, 0.0], pairs),
    )


def target(pairs: int = PAIRS, name: str = "target") -> TargetPolicy:
    """Takes the first plan with probability .4 at decisions of the first kind, always the second at the other."""
    return TargetPolicy(name, np.tile([0.4, 0.6, 0.0, 1.0, 0.0], pairs))


def unknown(choices: LoggedChoices) -> LoggedChoices:
    """The same without probabilities."""
    return replace(choices, probabilities=None)
