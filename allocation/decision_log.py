"""The decision log: what a policy saw, asked for and got, in Parquet that any data tool opens.

A log is a folder with one part for each decision and in it one row for each module:

    decisions/part-00000.parquet
    decisions/part-00001.parquet

Parts are written under another name, flushed to disk and renamed, so a crash leaves whole parts only.

Example:
    >>> import datasets
    >>> table = datasets.load_dataset("parquet", data_files="run/decisions/*.parquet")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..common.arrays import FloatArray, IntArray
from ..common.files import atomic_path
from ..errors import DataError, RunFolderError

SCHEMA_KEY, SCHEMA_VERSION = b"rankpilot.schema", b"2"
FEATURE_PREFIX, RUN_PREFIX = "feature.", "run."

_DECISION_TYPES = {
    "run": pa.string(),
    "policy": pa.string(),
    "decision": pa.int32(),
    "step": pa.int32(),
    "seed": pa.int64(),
    "loss": pa.float64(),
    "limit": pa.float64(),
    "predicted_cost": pa.float64(),
    "measured_cost": pa.float64(),
    "unit": pa.string(),
    "log_prob": pa.float64(),
    "rank_floor": pa.float64(),
}
_MODULE_TYPES = {
    "block": pa.int32(),
    "delta": pa.int32(),
    "rank_before": pa.int32(),
    "rank_asked": pa.int32(),
    "rank_after": pa.int32(),
    "score": pa.float64(),
}


@dataclass(frozen=True, eq=False)
class DecisionRecord:
    """One decision of a policy; L modules, F features.

    Attributes:
        run: name of the run.
        policy: name of the policy or rule that decided.
        decision: number of the decision in its run, from 0.
        step: optimiser steps done before it.
        seed: seed of the run.
        loss: latest training loss; None before the first step.
        limit: what a plan may cost, in `unit`.
        predicted_cost: predicted cost of the plan, in `unit`.
        measured_cost: measured since the decision before this one, in `unit`; None if nothing measures it.
        unit: "bytes" or "parameters".
        log_prob: log-probability of the whole action.
        rank_floor: rank floor of the plan (see `lora.plan.pack`).
        modules: full names, in the order of all arrays.
        blocks: layer of each module, int (L,).
        delta: rungs asked for, int (L,).
        rank_before: ranks in place, int (L,).
        rank_asked: ranks that the deltas lead to within the bounds, before the budget, int (L,).
        rank_after: ranks of the plan, int (L,).
        score: priority in the projection, float (L,).
        features: what the policy saw of each module, float32 (L, F).
        feature_names: names of the columns of `features`.
        run_features: what the policy saw of the whole run.
        notes: why a module did not get its rank of the plan, by name; the others are left out.

    Raises:
        DataError: lengths disagree, a name is used twice, or a number is out of range.
    """

    run: str
    policy: str
    decision: int
    step: int
    seed: int
    loss: float | None
    limit: float
    predicted_cost: float
    measured_cost: float | None
    unit: Literal["bytes", "parameters"]
    log_prob: float
    rank_floor: float
    modules: tuple[str, ...]
    blocks: IntArray
    delta: IntArray
    rank_before: IntArray
    rank_asked: IntArray
    rank_after: IntArray
    score: FloatArray
    features: NDArray[np.float32]
    feature_names: tuple[str, ...]
    run_features: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.modules)
        if count == 0 or self.decision < 0 or self.step < 0 or self.unit not in ("bytes", "parameters"):
            raise DataError(
                "A decision has modules, a number and a step from 0 on, and a unit 'bytes' or 'parameters'; "
                f"got {count} modules, decision {self.decision}, step {self.step}, unit {self.unit!r}."
            )
        shapes: dict[str, tuple[int, ...]] = {
            "blocks": (count,),
            "features": (count, len(self.feature_names)),
        }
        shapes |= {name: (count,) for name in _MODULE_TYPES if name != "block"}
        for name, wanted in shapes.items():
            found = np.shape(getattr(self, name))
            if found != wanted:
                raise DataError(f"`{name}` of decision {self.decision} has shape {found}, not {wanted}.")
        for names in (self.modules, self.feature_names):
            if len(set(names)) < len(names):
                raise DataError(f"A module or feature name of decision {self.decision} is used twice: {names}.")


class DecisionLog:
    """Writer and reader of one decision log.

    Args:
        folder: where the parts are; made by the first `append`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __len__(self) -> int:
        """How many decisions are logged."""
        return len(self._parts())

    def append(self, record: DecisionRecord) -> Path:
        """Write one decision, whole or not at all.

        Returns:
            The new part.

        Raises:
            RunFolderError: that decision is logged already; a resumed run calls `truncate` first.
        """
        path = self.folder / f"part-{record.decision:05d}.parquet"
        if path.exists():
            raise RunFolderError(f"Decision {record.decision} is already in {self.folder}. Call `truncate` on resume.")
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            pq.write_table(_to_table(record), stream)
            stream.flush()
            os.fsync(stream.fileno())
        return path

    def read(self) -> pa.Table:
        """All rows, by decision and inside it in the order of the modules.

        A feature that only some decisions have is null in the others.

        Raises:
            RunFolderError: the folder is missing or empty, or a part is corrupt or of another schema.
        """
        parts = self._parts()
        if not parts:
            raise RunFolderError(f"No decision log in {self.folder}: expected part-00000.parquet and following.")
        table = pa.concat_tables([_read_part(part) for part in parts], promote_options="default")
        return table.sort_by([("decision", "ascending"), ("module_index", "ascending")])

    def truncate(self, after_step: int) -> int:
        """Drop the decisions taken after a step: a run that resumes there takes them again.

        Args:
            after_step: the step of the checkpoint; a decision at exactly this step is kept.

        Returns:
            How many decisions were dropped.

        Raises:
            RunFolderError: a part is corrupt or of another schema; nothing is dropped then.
        """
        late = [part for part in self._parts() if _read_part(part)["step"][0].as_py() > after_step]
        for part in reversed(late):
            part.unlink()
        return len(late)

    def _parts(self) -> list[Path]:
        """Finished parts in order; what a crash left half-written sits in hidden folders."""
        return sorted(path for path in self.folder.glob("part-*.parquet") if path.is_file())


def _to_table(record: DecisionRecord) -> pa.Table:
    """One row for each module."""
    count = len(record.modules)
    columns: dict[str, Any] = {
        name: pa.repeat(pa.scalar(getattr(record, name), kind), count) for name, kind in _DECISION_TYPES.items()
    }
    columns["module_index"] = pa.array(range(count), pa.int32())
    columns["module"] = pa.array(record.modules, pa.string())
    for name, kind in _MODULE_TYPES.items():
        columns[name] = pa.array(np.asarray(record.blocks if name == "block" else getattr(record, name)), kind)
    changed = np.asarray(record.rank_asked) != np.asarray(record.rank_after)
    columns["changed_by_projection"] = pa.array(changed, pa.bool_())
    columns["note"] = pa.array([record.notes.get(name) for name in record.modules], pa.string())
    for index, name in enumerate(record.feature_names):
        columns[FEATURE_PREFIX + name] = pa.array(record.features[:, index], pa.float32())
    for name, value in record.run_features.items():
        columns[RUN_PREFIX + name] = pa.repeat(pa.scalar(value, pa.float32()), count)
    return pa.table(columns).replace_schema_metadata({SCHEMA_KEY: SCHEMA_VERSION})


def _read_part(path: Path) -> pa.Table:
    """The rows of one part, whatever the names of the folders around it look like."""
    try:
        with pq.ParquetFile(path) as part:
            table = part.read()
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(f"The decision log's part {path} is corrupt: {error}") from error
    found = (table.schema.metadata or {}).get(SCHEMA_KEY)
    if found != SCHEMA_VERSION or table.num_rows == 0:
        raise RunFolderError(
            f"{path} is no decision log of schema {SCHEMA_VERSION.decode()}: "
            f"its schema is {found.decode() if found else 'not named'}, with {table.num_rows} rows."
        )
    return table
