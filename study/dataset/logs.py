"""Rows from the decision logs of a comparison of policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...agents.evaluation.evaluate import LOGS, POLICIES, ROWS
from ...agents.evaluation.results import Row as Result
from ...agents.evaluation.results import read_rows
from ...agents.evaluation.runs import log_folder
from ...agents.learned.candidates import KEEP
from ...agents.rules import RULES
from ...allocation.deliberation import DRAWN
from ...allocation.log import LINES, DecisionLog, DecisionRecord
from ...common.files import read_object
from ...common.run_folder import CONFIG
from ...env.tasks.suites import VERSION
from ...errors import RunFolderError
from .columns import POLICY_RUNS
from .rows import Row, fold_of, of_suite, what_was_seen

RUNS_A_PART = 1500
"""Runs in one file of rows, at most: about 6,000 rows."""

DRAWING_RULES = ("random",)
"""Rules that draw their plans, nobody knows with which probabilities."""


@dataclass(frozen=True, eq=False)
class LoggedRuns:
    """The runs of a comparison that have ended and whose decisions were logged.

    Attributes:
        folder: of the comparison.
        origin: number of the source in the data set.
        results: of these runs, in the order of the file.
        unlogged: runs with a result and without a log.
        unended: logs of runs without a result; they are left out.
        task_steps: of each run; None if each has as many as its suite sets.
    """

    folder: Path
    origin: int
    results: tuple[Result, ...]
    unlogged: int
    unended: int
    task_steps: int | None

    @classmethod
    def open(cls, folder: Path, origin: int) -> LoggedRuns:
        """Find the logs of all results.

        Raises:
            RunFolderError: none of the results has a log.
        """
        results = read_rows(folder / ROWS)
        logged = tuple(row for row in results if len(DecisionLog(log_folder(folder / LOGS, row.key))))
        if not logged:
            raise RunFolderError(f"None of the {len(results)} runs in {folder / ROWS} has a log in {folder / LOGS}.")
        logs = sum(1 for _ in (folder / LOGS).glob(f"*/*/{LINES}"))
        settings = read_object(folder / CONFIG)
        return cls(folder, origin, logged, len(results) - len(logged), logs - len(logged), settings.get("task_steps"))

    @property
    def parts(self) -> int:
        """How many files of rows it gives."""
        return -(-len(self.results) // RUNS_A_PART)

    def files(self) -> Iterator[Path]:
        """All that is read."""
        yield self.folder / ROWS
        for result in self.results:
            yield from sorted(self._log(result).folder.iterdir())

    def rows(self, part: int) -> list[Row]:
        """The rows of some runs.

        Raises:
            RunFolderError: a log cannot be read.
        """
        some = self.results[part * RUNS_A_PART : (part + 1) * RUNS_A_PART]
        return [row for result in some for row in self._of_run(result)]

    def _log(self, result: Result) -> DecisionLog:
        return DecisionLog(log_folder(self.folder / LOGS, result.key))

    def _of_run(self, result: Result) -> Iterator[Row]:
        log = self._log(result)
        run = {
            "source": POLICY_RUNS,
            "origin": self.origin,
            "run": f"{self.origin}/{result.policy}/{result.task}/{result.seed}",
            "seed": result.seed,
            "fold": fold_of(result.seed),
            "behaviour": result.policy,
            **of_suite(result.task),
        }
        run |= {} if self.task_steps is None else {"total_steps": self.task_steps}
        same = ("task", "kind", "base", "place", "budget", "cost_kind", "loss", "failed")
        run |= {name: getattr(result, name) for name in (*same, "initial_loss", "uniform_loss", "best_loss")}
        for number in range(len(log)):
            yield run | _decision(result.policy, log.logged(number))

    def facts(self) -> dict[str, Any]:
        """What is known of the comparison."""
        weights = self.folder / POLICIES
        return {
            "kind": POLICY_RUNS,
            "name": self.folder.name,
            "behaviours": dict(Counter(result.policy for result in self.results)),
            "weights": read_object(weights) if weights.is_file() else {},
            "runs_without_log": self.unlogged,
            "logs_without_result": self.unended,
            "suite_version": VERSION,
        }

    def save_actor(self, folder: Path) -> bool:
        """There is none: several policies ran."""
        return False

    def save_more_plan_runs(self, folder: Path) -> None:
        """There are none."""


def _decision(policy: str, logged: DecisionRecord) -> Row:
    found, observation = logged.deliberation, logged.observation
    row = what_was_seen(observation.names, observation.modules, observation.run, logged.rank_after)
    row |= {"decision": logged.number, "step": logged.step}
    row |= {"behaviour_sha256": logged.policy_sha256, "probability": _probability(policy, logged)}
    if found is None:
        return row | {"choice": KEEP if logged.kept else None}
    name = found.candidates[found.taken]
    centred = found.actor_scores - found.actor_scores.mean()
    return row | {
        "temperature": found.temperature,
        "choice": "drawn" if name.startswith(DRAWN) else name,
        "actor_score": centred.astype(np.float32),
    }


def _probability(policy: str, logged: DecisionRecord) -> float | None:
    """The probability of the plan; None where it is not known."""
    if logged.correction:
        return None
    if logged.deliberation is not None:
        return float(logged.deliberation.probabilities[logged.deliberation.plan])
    always_the_same = policy in RULES and policy not in DRAWING_RULES
    return 1.0 if always_the_same or logged.policy_sha256 is not None else None
