"""Restricted choice: what was observed of the logged plan that a policy ranks best, without weights and models."""

from __future__ import annotations

import numpy as np

from .estimates import PolicyEstimate, unweighted
from .logged import LoggedChoices
from .targets import TargetPolicy


def restricted_choice(choices: LoggedChoices, target: TargetPolicy) -> PolicyEstimate:
    """The mean observed outcome of the plan that the target ranks best among a task's logged ones.

    V = mean over tasks t of r(t, argmax over the plans p logged for t of score(t, p)); plans that tie count equally.
    This is exact, whatever policy decided, but of the target restricted to those plans: with fewer plans to choose
    from, a target usually gains less, and nothing is said of what it would do among all plans.

    Args:
        choices: several decisions a task, whose scores can be compared: all from the same observation.
        target: ranks the plans.

    Returns:
        An estimate for the restricted policy; refused if no task has two logged plans that the target tells apart, or
        if there are few tasks.

    Raises:
        DataError: the target does not fit the decisions.
    """
    target.check(choices)
    scores, number = choices.of_chosen(target.ranking), choices.task_numbers
    tasks = int(number.max()) + 1
    best, worst = np.full(tasks, -np.inf), np.full(tasks, np.inf)
    np.maximum.at(best, number, scores)
    np.minimum.at(worst, number, scores)
    kept = (scores == best[number]).astype(np.float64)
    ties = np.bincount(number, kept)
    if not (best > worst).any():
        refused = "No choice: of no task does the target tell logged plans apart."
        return PolicyEstimate("restricted choice", None, refused, None)
    return unweighted("restricted choice", choices, choices.outcomes, kept / ties[number])
