"""Logged choices from the runs of a policy that explored, and what other policies would have chosen there.

Only first decisions count: the later ones are part of how the run went on, under the policy that was logged. So an
estimate is what a policy's first plan would be worth if that policy took over afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...agents.evaluation.evaluate import LOGS, ROWS
from ...agents.evaluation.results import Row, read_rows
from ...agents.evaluation.runs import log_folder
from ...allocation.deliberation import Deliberation
from ...allocation.log import DecisionLog, DecisionRecord
from ...allocation.policy import Policy, decided_plan
from ...common.arrays import IntArray
from ...errors import RunFolderError
from .cross_fit import FOLDS, Predict, cross_fit
from .logged import LoggedChoices
from .targets import TargetPolicy


@dataclass(frozen=True, eq=False)
class LoggedSuite:
    """First decisions of one policy's runs.

    Attributes:
        decisions: one a run.
        choices: the same as a log of choices. The outcome is how much lower the log loss is than that of uniform rank.
    """

    decisions: tuple[DecisionRecord, ...]
    choices: LoggedChoices

    def target(self, policy: Policy) -> TargetPolicy | None:
        """What a policy would have chosen; None if it takes plans that were not among those that could be drawn."""
        chosen = [_place(logged, policy) for logged in self.decisions]
        if any(place is None for place in chosen):
            return None
        scores = np.zeros(int(self.choices.plans.sum()))
        scores[self.choices.starts + np.array(chosen)] = 1.0
        return TargetPolicy.greedy(policy.name, self.choices, scores)


def logged_suite(folder: Path, name: str) -> LoggedSuite:
    """The first decisions of a policy's runs, with predictions if there are tasks enough to fit them.

    Args:
        folder: of `rankpilot evaluate --logs`.
        name: what rows call the policy.

    Raises:
        RunFolderError: no such runs, or none of them was logged with the votes on its plans.
    """
    rows = [row for row in read_rows(folder / ROWS) if row.policy == name]
    if not rows:
        raise RunFolderError(f"{folder / ROWS} holds no runs of {name!r}.")
    pairs = [(row, logged) for row in rows if (logged := _first(folder, row)) is not None]
    if not pairs:
        raise RunFolderError(
            f"{folder / LOGS} holds no decision of {name!r} with the votes on its plans. Run `rankpilot evaluate "
            "explore-0.5:FOLDER --logs` first."
        )
    deliberations = [_deliberation(logged) for _, logged in pairs]
    explored = all(each.temperature for each in deliberations)
    choices = LoggedChoices(
        tasks=[row.task for row, _ in pairs],
        plans=np.array([len(each.plans) for each in deliberations]),
        chosen=np.array([each.plan for each in deliberations]),
        outcomes=np.array([_gain(row) for row, _ in pairs]),
        probabilities=np.concatenate([each.probabilities for each in deliberations]) if explored else None,
    )
    if len(set(choices.tasks)) >= FOLDS:
        choices = cross_fit(choices, _Scaled(choices, deliberations).fit)
    return LoggedSuite(tuple(logged for _, logged in pairs), choices)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """Predicts gains as a straight line of the mean vote on a plan, which has a unit of its own."""

    choices: LoggedChoices
    deliberations: Sequence[Deliberation]

    def fit(self, decisions: IntArray) -> Predict:
        """Least squares over some decisions."""
        taken = np.array([self.deliberations[number].mean[self.deliberations[number].plan] for number in decisions])
        design = np.column_stack([np.ones(len(taken)), taken])
        (offset, slope), *_ = np.linalg.lstsq(design, self.choices.outcomes[decisions], rcond=None)
        return lambda others: np.concatenate([offset + slope * self.deliberations[number].mean for number in others])


def _first(folder: Path, row: Row) -> DecisionRecord | None:
    log = DecisionLog(log_folder(folder / LOGS, row.key))
    logged = log.logged(0) if len(log) else None
    return logged if logged is not None and logged.deliberation is not None else None


def _deliberation(logged: DecisionRecord) -> Deliberation:
    assert logged.deliberation is not None, "chosen so"
    return logged.deliberation


def _gain(row: Row) -> float:
    """How much lower the log loss is than that of uniform rank; a run that failed has the loss before training."""
    return math.log(row.uniform_loss / (row.initial_loss if row.loss is None else row.loss))


def _place(logged: DecisionRecord, policy: Policy) -> int | None:
    """The number of the plan that a policy takes, among those of the deliberation."""
    ranks = decided_plan(logged.observation.problem, policy.decide(logged.observation)).ranks
    same = np.flatnonzero((_deliberation(logged).plans == ranks).all(axis=1))
    return int(same[0]) if len(same) else None
