"""Rows from the plan runs of a training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...agents.learned.candidates import FIXED_NAMES, KEEP
from ...agents.learned.policy import LearnedPolicy
from ...agents.learned.policy_file import CARD, load_policy, read_card, save_policy
from ...agents.learned.structures import ALL_LINEAR
from ...agents.training.config import TrainConfig
from ...agents.training.plan_runs import CHOICES, MOVES, RUNS, PlanRun, read_plan_run
from ...agents.training.plan_runs import PLAN_RUNS as PLAN_RUNS_FOLDER
from ...agents.training.real_plan_runs import read_real_plan_runs
from ...common.files import atomic_path
from ...common.settings import as_json, from_json
from ...env.tasks.suites import VERSION
from ...errors import ConfigError, PolicyFileError, RunFolderError
from .columns import PLAN_RUNS
from .rows import Row, fold_of, what_was_seen

STACKS = 32
"""Stacks of plan runs in one file of rows, at most: about 6,000 rows."""

TEMPLATES = "train"
"""The split whose tasks plan runs are like; see `FreshTasks`."""


@dataclass(frozen=True, eq=False)
class TrainingRuns:
    """The plan runs of a finished training.

    Attributes:
        folder: of the training.
        origin: number of the source in the data set.
        stacks: the files of plan runs, in the order in which they were learned from.
        card: of the policy.
        config: of the training.
        policy: what came out.
    """

    folder: Path
    origin: int
    stacks: tuple[Path, ...]
    card: dict[str, Any]
    config: TrainConfig
    policy: LearnedPolicy

    @classmethod
    def open(cls, folder: Path, origin: int) -> TrainingRuns:
        """Read what a folder holds.

        Raises:
            RunFolderError: the training is not finished, or of a version that did not note its tasks, or the file of
                further plan runs that it learned from is not there.
        """
        stacks = tuple(sorted((folder / PLAN_RUNS_FOLDER).glob("*.safetensors")))
        if not (folder / CARD).is_file() or not stacks:
            raise RunFolderError(
                f"The training in {folder} is not finished, or has no plan runs. Finish it: rankpilot train --resume."
            )
        try:
            card = read_card(folder)
            config, policy = from_json(TrainConfig, card.get("training")), load_policy(folder)
        except (PolicyFileError, ConfigError) as error:
            raise RunFolderError(f"The training in {folder} cannot be read: {error}") from error
        assert isinstance(policy, LearnedPolicy)
        if config.more_plan_runs and not Path(config.more_plan_runs).is_file():
            raise RunFolderError(
                f"The training in {folder} also learned from the plan runs in {config.more_plan_runs}, and there is no "
                "such file. Put it back, or call this from the folder in which the training was started."
            )
        return cls(folder, origin, stacks, card, config, policy)

    @property
    def parts(self) -> int:
        """How many files of rows it gives."""
        return -(-len(self.stacks) // STACKS)

    def files(self) -> Iterator[Path]:
        """All that is read."""
        yield from (self.folder / CARD, *self.stacks)
        if self.config.more_plan_runs:
            yield Path(self.config.more_plan_runs)

    def rows(self, part: int) -> list[Row]:
        """The rows of some stacks, by stack, decision and slot.

        Raises:
            RunFolderError: a file cannot be read, or is of a version that did not note its tasks.
        """
        numbers = range(part * STACKS, min((part + 1) * STACKS, len(self.stacks)))
        return [row for number in numbers for row in self._of_stack(number)]

    def _of_stack(self, number: int) -> Iterator[Row]:
        path = self.stacks[number]
        runs = read_plan_run(path)
        if not runs.tasks or runs.choices is None:
            raise RunFolderError(
                f"{path} was written by an earlier version, which did not write down tasks and choices. Train again."
            )
        steps = self.config.schedule.steps(runs.tasks[0].steps)
        for decision, slot in np.argwhere(runs.ranks.min(axis=2) >= 0).tolist():
            yield {
                **self._run(runs, number, slot),
                **self._decision(runs, decision, slot),
                "step": steps[decision],
            }

    def _run(self, runs: PlanRun, number: int, slot: int) -> Row:
        """What is the same at all decisions of a run."""
        task, loss = runs.tasks[slot // RUNS], float(runs.losses[slot])
        failed = not np.isfinite(loss)
        return {
            "source": PLAN_RUNS,
            "origin": self.origin,
            "run": f"{self.origin}/{number:05}/{slot:02}",
            "stack": number,
            "slot": slot,
            "task": task.id,
            "seed": task.seed,
            "split": TEMPLATES,
            "fold": fold_of(task.seed),
            "kind": task.kind,
            "base": task.base,
            "place": task.placement if task.kind == "planted" else task.corpus,
            "budget": task.budget,
            "cost_kind": task.cost_kind,
            "total_steps": task.steps,
            "learning_rate": task.learning_rate,
            "behaviour": PLAN_RUNS,
            "initial_loss": float(runs.initial[slot]),
            "loss": None if failed else loss,
            "failed": failed,
        }

    def _decision(self, runs: PlanRun, decision: int, slot: int) -> Row:
        assert runs.choices is not None
        choice = CHOICES[runs.choices[decision, slot]]
        seen = what_was_seen(
            runs.names, runs.modules[decision, slot], runs.run[decision, slot], runs.ranks[decision, slot]
        )
        first = decision == 0
        later = 1 - MOVES if choice == KEEP else MOVES
        return {
            "decision": decision,
            "choice": choice,
            "choice_probability": 1.0 if first else later,
            # A draw is continuous; and a plan that is kept may also be drawn. How likely these plans are, nobody knows.
            "probability": 1.0 if first and choice in (*FIXED_NAMES, ALL_LINEAR) else None,
            "actor_score": runs.scores[decision, slot],
            **seen,
        }

    def facts(self) -> dict[str, Any]:
        """What is known of the training."""
        return {
            "kind": PLAN_RUNS,
            "name": self.folder.name,
            "stacks": len(self.stacks),
            "runs_per_task": RUNS,
            "training": self._settings(),
            "suite_version": self.card.get("suite_version", VERSION),
            "made_with": self.card.get("versions", {}),
        }

    def save_actor(self, folder: Path) -> bool:
        """Write the actor, as a policy without value ensemble."""
        given = {"name": self.policy.name, "training": self._settings()}
        save_policy(folder, self.policy.network, self.config.schedule, given)
        return True

    def save_more_plan_runs(self, folder: Path) -> None:
        """Copy the file of further plan runs, if there is one, into the data set.

        Raises:
            RunFolderError: it cannot be read.
        """
        if self.config.more_plan_runs:
            source = Path(self.config.more_plan_runs)
            read_real_plan_runs(source)
            with atomic_path(folder / self._more_plan_runs) as temporary:
                shutil.copyfile(source, temporary)

    @property
    def _more_plan_runs(self) -> str:
        """What the file of further plan runs is called in the data set."""
        return f"more-plan-runs-{self.origin}.safetensors"

    def _settings(self) -> dict[str, Any]:
        """The settings of the training, which name the data set's own copy of further plan runs."""
        settings: dict[str, Any] = as_json(TrainConfig, self.config)
        return settings | ({"more_plan_runs": self._more_plan_runs} if self.config.more_plan_runs else {})
