"""The decision log: what a policy saw, wanted and got, in Parquet that any data tool opens.

A log is a folder with one part for each decision, and in it one row for each module. Beside each part is the state of
its decision: candidates, plans and votes. The problems that the decisions solved are one file whenever what plans cost
or may cost has changed:

    decisions/part-00000.parquet
    decisions/part-00001.parquet
    decisions/problem-00000.safetensors
    decisions/recipes-5feceb66ffc8.safetensors
    decisions/state-00000.safetensors
    decisions/state-00001.safetensors

Files are written under another name, flushed to disk and renamed, so a crash leaves whole files only.

Example:
    >>> import datasets
    >>> table = datasets.load_dataset("parquet", data_files="run/decisions/*.parquet")  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..common.arrays import IntArray
from ..common.files import atomic_path
from ..errors import ConfigError, RunFolderError, first_line
from .decision_state import DecisionState, read_state
from .deliberation import Deliberation
from .features import FIRST_INPUTS, MODULE_FEATURES, RUN_FEATURES
from .log_part import (
    DECISION_TYPES,
    FEATURE_PREFIX,
    MODULE_TYPES,
    RUN_PREFIX,
    SCHEMA_VERSION,
    part_name,
    read_part,
    schema_of,
)
from .problem import AllocationProblem
from .problem_file import problem_bytes, read_problem

if TYPE_CHECKING:
    from .decision_record import DecisionRecord
    from .observation import Observation

logger = logging.getLogger(__name__)

_FILES = ("part-*.parquet", "state-*.safetensors", "problem-*.safetensors", "recipes-*.safetensors")
"""Names of the files of a log, which may lie in a folder with others."""


@dataclass(frozen=True, eq=False)
class LoggedDecision:
    """One decision as its log tells it.

    Attributes:
        table: its rows, one a module; see `DECISION_TYPES` and `MODULE_TYPES`.
        problem: the plans that were possible, with the pinned modules.
        observation: what the policy saw.
        state: what the policy computed; None in a log of schema 3, which does not hold it.
    """

    table: pa.Table
    problem: AllocationProblem
    observation: Observation
    state: DecisionState | None

    @property
    def deliberation(self) -> Deliberation | None:
        """What the policy computed; None where it was no ensemble's decision, and in a log of schema 3."""
        return None if self.state is None else self.state.deliberation

    def value(self, column: str) -> Any:
        """One of `DECISION_TYPES`; None where the log does not know it."""
        return self.table[column][0].as_py() if column in self.table.column_names else None

    def plan(self) -> dict[str, int]:
        """The rank of each module after the decision, by its full name."""
        return dict(zip(self.observation.names, self.ranks("rank_after").tolist(), strict=True))

    def ranks(self, column: str) -> IntArray:
        """One of the columns of ranks, int64 (modules,)."""
        return np.asarray(self.table[column].to_numpy(), dtype=np.int64)


class DecisionLog:
    """Writer and reader of one decision log.

    Args:
        folder: where the files are; made by `make_folder` or the first `append`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path = Path(folder)

    def __len__(self) -> int:
        """How many decisions are logged."""
        return len(self._parts())

    def make_folder(self) -> None:
        """Make the folder now, and not after minutes of work.

        Raises:
            RunFolderError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"The decision log cannot be written to {self.folder}: {first_line(error)}. Pass another folder as "
                "`log`, or make that one writable."
            ) from error

    def put_aside(self) -> Path | None:
        """Move what an earlier run has logged into a folder beside this one, since another run begins.

        Returns:
            That folder, `decisions-1` or the next number that is free; None if nothing is logged.

        Raises:
            RunFolderError: it cannot be made.
        """
        if not self._parts():
            return None
        numbered = (self.folder.with_name(f"{self.folder.name}-{number}") for number in count(1))
        aside = DecisionLog(next(folder for folder in numbered if not folder.exists()))
        aside.make_folder()
        for path in [path for pattern in _FILES for path in self.folder.glob(pattern)]:
            shutil.move(path, aside.folder / path.name)
        return aside.folder

    def append(self, record: DecisionRecord) -> Path:
        """Write one decision, whole or not at all.

        Returns:
            The new part.

        Raises:
            RunFolderError: that decision is logged already; a resumed run calls `truncate` first.
        """
        path = self._part(record.decision)
        if path.exists():
            raise RunFolderError(f"Decision {record.decision} is already in {self.folder}. Call `truncate` on resume.")
        table = record.to_table(self._write_problem(record))
        for name, content in record.state.files(self._state(record.decision).name).items():
            _write(self.folder / name, lambda stream, content=content: stream.write(content))  # type: ignore[misc]
        _write(path, lambda stream: pq.write_table(table, stream))
        return path

    def read(self, on_error: Callable[[RunFolderError], None] | None = None) -> pa.Table:
        """All rows, by decision and inside it in the order of the modules.

        A column that only some decisions have is null in the others.

        Args:
            on_error: called with the error of each part that cannot be read, which is then left out. Without it, that
                error is raised.

        Raises:
            RunFolderError: the folder is missing or empty, or a part is corrupt or of another schema; with `on_error`,
                no part can be read.
        """
        parts = self._parts()
        if not parts:
            raise RunFolderError(f"No decision log in {self.folder}: expected part-00000.parquet and following.")
        tables = []
        for part in parts:
            try:
                tables.append(read_part(part).sort_by("module_index"))
            except RunFolderError as error:
                if on_error is None:
                    raise
                on_error(error)
        if not tables:
            raise RunFolderError(f"The decision log in {self.folder} has {len(parts)} parts, and none can be read.")
        for version in (2, 3):
            earlier = sum(schema_of(table) == version for table in tables)
            if earlier:
                logger.warning(
                    "%d of %d decisions in %s are of log schema %d: columns that it lacks are empty.",
                    earlier,
                    len(parts),
                    self.folder,
                    version,
                )
        # Sorted part by part: a long log would be in memory twice if it were sorted as a whole.
        tables.sort(key=lambda table: table["decision"][0].as_py())
        table = pa.concat_tables(tables, promote_options="default")
        for name, kind in (DECISION_TYPES | MODULE_TYPES).items():
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, kind))
        return table

    def problem(self, decision: int) -> AllocationProblem:
        """The plans that were possible at a decision.

        `project` on it gives the logged ranks once more, but for those that a person changed in review.

        Raises:
            RunFolderError: there is no such decision, it was logged without its problem, or a file is corrupt.
        """
        return self._problem(self._table(decision))

    def logged(self, decision: int) -> LoggedDecision:
        """All that is known of a decision. Features that its policy could not see yet are 0.

        Raises:
            RunFolderError: there is no such decision, it was logged without its problem or by a version whose policies
                saw other features, or a file is corrupt.
        """
        from .observation import Observation  # late: it loads torch, which reading rows does not need

        table = self._table(decision)
        problem = self._problem(table)
        seen = [name.removeprefix(FEATURE_PREFIX) for name in table.column_names if name.startswith(FEATURE_PREFIX)]
        if not set(MODULE_FEATURES[: FIRST_INPUTS.modules]) <= set(seen) <= set(MODULE_FEATURES):
            raise RunFolderError(
                f"Decision {decision} in {self.folder} was made from other features than those of this version: "
                f"{', '.join(sorted(set(seen) ^ set(MODULE_FEATURES)))}."
            )
        modules = np.zeros((len(table), len(MODULE_FEATURES)), dtype=np.float32)
        for name in seen:
            modules[:, MODULE_FEATURES.index(name)] = table[FEATURE_PREFIX + name].to_numpy()
        known = set(table.column_names)
        run = [table[RUN_PREFIX + name][0].as_py() if RUN_PREFIX + name in known else 0.0 for name in RUN_FEATURES]
        observation = Observation(
            modules,
            np.array(run, dtype=np.float32),
            replace(problem, pinned=None),  # as the policy saw it
            tuple(table["module"].to_pylist()),
        )
        state = read_state(self._state(decision)) if schema_of(table) >= SCHEMA_VERSION else None
        if state and state.deliberation and state.deliberation.plans.shape[1] != len(table):
            raise RunFolderError(f"{self._state(decision)} is of another decision: its plans are for other modules.")
        return LoggedDecision(table, problem, observation, state)

    def _table(self, decision: int) -> pa.Table:
        path = self._part(decision)
        if not path.is_file():
            raise RunFolderError(f"No decision {decision} in {self.folder}: it holds {len(self)} decisions.")
        return read_part(path)

    def _problem(self, table: pa.Table) -> AllocationProblem:
        if "problem" not in table.column_names:
            path = self._part(table["decision"][0].as_py())
            raise RunFolderError(f"{path} is of log schema 2, which does not hold the problem that was solved.")
        if "max_step" not in table.column_names:  # it may hold no value, so that its lack was not seen before
            raise RunFolderError(f"A part of {self.folder} is corrupt: max_step is missing.")
        first = table.slice(0, 1).select(["problem", "max_step", "hysteresis"]).to_pylist()[0]
        pinned = table["pinned"].to_numpy()
        path = self.folder / first["problem"]
        problem = read_problem(path)
        if len(problem.max_ranks) != len(table) or problem.cost.unit != table["unit"][0].as_py():
            raise RunFolderError(f"{path} is the problem of other modules, or of another unit, than its decision's.")
        try:
            return replace(
                problem,
                ranks=table["rank_before"].to_numpy().astype(np.int64),
                max_step=first["max_step"],
                hysteresis=first["hysteresis"],
                pinned=pinned if pinned.any() else None,
            )
        except ConfigError as error:
            raise RunFolderError(f"{path} does not fit its decision: {error}") from error

    def truncate(self, keep: int) -> int:
        """Drop the decisions that followed a checkpoint: a run that resumes there takes them again.

        Args:
            keep: how many decisions had been taken at the checkpoint.

        Returns:
            How many decisions were dropped.

        Raises:
            RunFolderError: a part that is kept is corrupt or of another schema; nothing is dropped then.
        """
        parts = self._parts()
        late = [part for part in parts if part >= self._part(keep)]
        tables = [read_part(part) for part in parts if part not in late]
        for part in reversed(late):
            part.unlink()
        kept = {self._state(table["decision"][0].as_py()).name for table in tables}
        for path in self.folder.glob("state-*.safetensors"):
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob("recipes-*.safetensors") if not tables else ():
            path.unlink()
        needed = {table["problem"][0].as_py() for table in tables if "problem" in table.column_names}
        for path in self.folder.glob("problem-*.safetensors"):
            if path.name not in needed:
                path.unlink()
        return len(late)

    def _write_problem(self, record: DecisionRecord) -> str:
        """Write the problem of a decision, unless it is that of the decision before; the name of its file."""
        content = problem_bytes(record.problem)
        before = [part for part in self._parts() if part < self._part(record.decision)]
        if before:
            table = read_part(before[-1])
            latest = table["problem"][0].as_py() if "problem" in table.column_names else None
            if latest and (self.folder / latest).is_file() and (self.folder / latest).read_bytes() == content:
                return str(latest)
        name = f"problem-{record.decision:05d}.safetensors"
        _write(self.folder / name, lambda stream: stream.write(content))
        return name

    def _part(self, decision: int) -> Path:
        return self.folder / part_name(decision)

    def _state(self, decision: int) -> Path:
        return self.folder / f"state-{decision:05d}.safetensors"

    def _parts(self) -> list[Path]:
        """Finished parts in order; what a crash left half-written sits in hidden folders."""
        return sorted(path for path in self.folder.glob("part-*.parquet") if path.is_file())


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, flush it to disk and rename it."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
