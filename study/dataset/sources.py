"""What a data set is made from: folders of trainings, and folders of comparisons whose decisions were logged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ...agents.evaluation.evaluate import LOGS, ROWS
from ...agents.training.plan_runs import PLAN_RUNS as PLAN_RUNS_FOLDER
from ...errors import RunFolderError
from .logs import LoggedRuns
from .plan_runs import TrainingRuns
from .rows import Row


class Source(Protocol):
    """A folder that rows come from."""

    @property
    def parts(self) -> int:
        """How many files of rows it gives, at least 1."""

    def files(self) -> Iterator[Path]:
        """All that is read; none of it may change while the data set is written."""

    def rows(self, part: int) -> list[Row]:
        """The rows of one file.

        Raises:
            RunFolderError: a file cannot be read.
        """

    def facts(self) -> dict[str, Any]:
        """What `dataset.json` tells of it, as JSON values."""

    def save_actor(self, folder: Path) -> bool:
        """Write the actor that the rows' scores are of into a folder; False if there is none."""

    def save_more_plan_runs(self, folder: Path) -> None:
        """Write the plan runs that a training learned from beside those of the rows, if any, into the data set."""


def open_source(folder: Path, origin: int) -> Source:
    """The source in a folder.

    Args:
        folder: of `rankpilot train`, or of `rankpilot evaluate --logs`.
        origin: its number in the data set.

    Raises:
        RunFolderError: it is neither, or not complete.
    """
    if (folder / PLAN_RUNS_FOLDER).is_dir():
        return TrainingRuns.open(folder, origin)
    if (folder / ROWS).is_file() and (folder / LOGS).is_dir():
        return LoggedRuns.open(folder, origin)
    raise RunFolderError(
        f"{folder} gives no rows: it is neither the folder of a training with plan runs (rankpilot train --plan-tasks) "
        "nor that of a comparison with logs (rankpilot evaluate --logs)."
    )
