"""One part of a decision log: its columns, and how its file is read and checked.

A log may be a stranger's, so nothing in it is trusted: sizes are bounded before rows are read, columns have their
types, and no name in it leads out of its folder.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..common.parquet_files import ParquetLimits, read_parquet
from ..errors import DataError, RunFolderError, shown
from .features import EARLIER_FEATURE_NAMES

SCHEMA_KEY, SCHEMA_VERSION = b"rankpilot.schema", 4
FEATURE_PREFIX, RUN_PREFIX = "feature.", "run."

DECISION_TYPES = {
    "run": pa.string(),
    "policy": pa.string(),
    "policy_sha256": pa.string(),
    "decision": pa.int32(),
    "step": pa.int32(),
    "seed": pa.int64(),
    "loss": pa.float64(),
    "limit": pa.float64(),
    "predicted_cost": pa.float64(),
    "measured_cost": pa.float64(),
    "unit": pa.string(),
    "max_step": pa.int32(),
    "hysteresis": pa.float64(),
    "rank_floor": pa.float64(),
    "depth_bias": pa.float64(),
    "log_prob": pa.float64(),
    "expected": pa.float64(),
    "uncertainty": pa.float64(),
    "margin": pa.float64(),
    "tie_size": pa.int32(),
    "kept": pa.bool_(),
    "filled": pa.int32(),
    "correction": pa.bool_(),
    "problem": pa.string(),
}
"""Columns with one value a decision."""

MODULE_TYPES = {
    "module_index": pa.int32(),
    "module": pa.string(),
    "block": pa.int32(),
    "pinned": pa.bool_(),
    "rank_before": pa.int32(),
    "rank_wanted": pa.int32(),
    "rank_clipped": pa.int32(),
    "rank_after": pa.int32(),
    "score": pa.float64(),
    "changed_by_projection": pa.bool_(),
    "note": pa.string(),
}
"""Columns with one value a module."""

_SCHEMA_2 = {"rank_asked": "rank_clipped"} | {
    FEATURE_PREFIX + earlier: FEATURE_PREFIX + name for earlier, name in EARLIER_FEATURE_NAMES.items()
}
"""Columns of schema 2, and what they are called now."""

LIMITS = ParquetLimits(file_bytes=2**28, rows=2**18, columns=1000, memory_bytes=2**30)
"""Of one part. The largest models with a linear module for each of their experts have 50,000 modules."""

_KNOWN = ("decision", "step", "limit", "predicted_cost", "unit", "module_index", "module", "rank_before", "rank_after")
"""Columns that a part of any schema has, with a value in each row."""

_KNOWN_LATER = ("problem", "pinned", "hysteresis")
"""The same from schema 3 on."""

_KNOWN_NOW = tuple(name for name in MODULE_TYPES if name != "note")
"""The same from schema 4 on, of the columns with one value a module."""

_RANKS = ("rank_before", "rank_wanted", "rank_clipped", "rank_after")

PROBLEM_NAME = re.compile(r"problem-[0-9]{5,20}\.safetensors")
"""What the file of a problem is called, beside its part."""

MOST_DECISION = 999_999
"""The highest number of a decision. Pages have a place for each number up to that of the last one."""


def part_name(decision: int) -> str:
    """What the part of a decision is called."""
    return f"part-{decision:05d}.parquet"


def schema_of(table: pa.Table) -> int:
    """The version of the schema in which a part was written; 0 if it names none."""
    version = (table.schema.metadata or {}).get(SCHEMA_KEY, b"0")
    return int(version) if re.fullmatch(rb"[0-9]{1,9}", version) else 0


def read_part(path: Path) -> pa.Table:
    """The rows of one part, by the numbers of their modules.

    Raises:
        RunFolderError: it is missing, damaged, too large, of another schema, or does not hold the decision of its name.
    """
    try:
        table = read_parquet(path, LIMITS)
    except (DataError, OSError) as error:
        raise RunFolderError(f"The decision log's part {path} is corrupt: {error}") from error
    version = schema_of(table)
    if version not in (2, 3, SCHEMA_VERSION) or table.num_rows == 0:
        raise RunFolderError(
            f"{path} is no decision log of schema 2, 3 or {SCHEMA_VERSION}: its schema is {version or 'not named'}, "
            f"with {table.num_rows} rows. Read it with the version of rankpilot that wrote it."
        )
    if version == 2:
        renamed = table.rename_columns([_SCHEMA_2.get(name, name) for name in table.column_names])
        table = renamed.replace_schema_metadata(table.schema.metadata)
    fault = _fault_in_columns(table, version) or _fault_in_values(table, path.name)
    if fault:
        raise RunFolderError(f"The decision log's part {path} is corrupt: {fault}.")
    return table.sort_by("module_index")


def _fault_in_columns(table: pa.Table, version: int) -> str:
    """What is wrong with the columns of a part, in a few words; empty if they are as they were written."""
    if len(set(table.column_names)) < len(table.column_names):
        return "two columns have one name"
    needed = (*_KNOWN, *(_KNOWN_LATER if version > 2 else ()), *(_KNOWN_NOW if version > 3 else ()))
    for name in needed:
        if name not in table.column_names or table[name].null_count:
            return f"{name} is missing, in some row or in all"
    for field in table.schema:
        own = (DECISION_TYPES | MODULE_TYPES).get(field.name)
        feature = field.name.startswith((FEATURE_PREFIX, RUN_PREFIX))
        wanted = pa.float32() if feature else own
        if wanted is not None and field.type not in (wanted, pa.null()):
            return f"{shown(field.name)} is of type {shown(str(field.type))}, not {wanted}"
        if feature and table[field.name].null_count:
            return f"{shown(field.name)} is missing in some row"
    return ""


def _fault_in_values(table: pa.Table, name_of_part: str) -> str:
    """What is wrong with the values of a part; empty if they are those of the one decision that its name says."""
    constant = [name for name in DECISION_TYPES if name in table.column_names and name in (*_KNOWN, *_KNOWN_LATER)]
    for name in constant:
        if len(table[name].unique()) > 1:
            return f"{name} differs between its rows"
    first = table.slice(0, 1).to_pylist()[0]
    if first["decision"] < 0 or first["step"] < 0 or first["unit"] not in ("bytes", "parameters"):
        return f"it is of decision {first['decision']}, step {first['step']} and unit {shown(first['unit'])}"
    if first["decision"] > MOST_DECISION or name_of_part != part_name(first["decision"]):
        return f"it is of decision {first['decision']}; its name says another, or one above {MOST_DECISION:,}"
    if sorted(table["module_index"].to_pylist()) != list(range(table.num_rows)):
        return "its modules are not numbered from 0 on"
    if len(table["module"].unique()) < table.num_rows:
        return "two modules have one name"
    for name in _RANKS:
        if name not in table.column_names:
            continue
        if table[name].null_count:
            return f"{name} is missing in some row"
        if np.min(table[name].to_numpy()) < 0:
            return f"{name} is below 0"
    if "problem" in table.column_names and not PROBLEM_NAME.fullmatch(first["problem"]):
        return f"its problem is in a file called {shown(first['problem'])}"
    return ""
