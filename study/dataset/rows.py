"""Rows of a data set: one for each decision of a run, made from what a source knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...allocation.features import FEATURE_PREFIX, MODULE_FEATURES, RUN_FEATURES, RUN_PREFIX
from ...common.arrays import IntArray
from ...env.tasks.suite_names import SPLITS, SUITES
from ...env.tasks.suites import load_suite
from .columns import COLUMNS, SCHEMA_OF_FILES

FOLDS = 5

Row = dict[str, Any]
"""A row by column; columns that it lacks are null."""


def what_was_seen(names: Iterable[str], modules: NDArray[np.float32], run: NDArray[np.float32], ranks: IntArray) -> Row:
    """The part of a row that tells what was seen and decided.

    Args:
        names: of the modules.
        modules: their features, float32 (modules, len(MODULE_FEATURES)).
        run: features of the run, float32 (len(RUN_FEATURES),).
        ranks: after the decision, (modules,).
    """
    row: Row = {"module": list(names), "ranks": ranks.astype(np.int32)}
    row |= {FEATURE_PREFIX + name: modules[:, index] for index, name in enumerate(MODULE_FEATURES)}
    return row | {RUN_PREFIX + name: run[index] for index, name in enumerate(RUN_FEATURES)}


def fold_of(seed: int) -> int:
    """The fold of all tasks with this seed, 0 to `FOLDS` - 1."""
    return hashlib.sha256(str(seed).encode()).digest()[0] % FOLDS


def of_suite(task: str) -> Row:
    """What the suites tell of the task with this id: its split, steps and learning rate; nothing of another task."""
    return _suites().get(task, {})


@cache
def _suites() -> Mapping[str, Row]:
    return {
        task.id: {"split": split, "total_steps": task.steps, "learning_rate": task.learning_rate}
        for suite in SUITES
        for split in SPLITS
        for task in load_suite(suite, split)
    }


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as a table with all columns."""
    arrays = [pa.array([row.get(column.name) for row in rows], column.kind) for column in COLUMNS]
    return pa.Table.from_arrays(arrays, schema=SCHEMA_OF_FILES)
