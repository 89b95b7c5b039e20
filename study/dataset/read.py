"""Reads data sets of allocation decisions, and checks that they are whole.

This module loads pyarrow and no library for training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...common.files import read_json, sha256
from ...common.parquet_files import ParquetLimits, check_parquet, read_parquet
from ...errors import DataError, first_line
from .columns import FORMAT, SCHEMA, SCHEMA_OF_FILES

FACTS, CARD = "dataset.json", "README.md"

SAMPLE = Path(__file__).parent / "sample"
"""Folder of the data set that ships with the package."""

_NAMES = re.compile(r"trials-\d{5}\.parquet|actor-\d+/(policy\.safetensors|card\.json)|more-plan-runs-\d+\.safetensors")

MOST_FACTS, MOST_FILE, MOST_UNPACKED = 2**22, 2**31, 2**33
"""Bytes, at most, of `dataset.json`, of any other file, and of one file's rows when they are unpacked."""

MOST_ROWS = 10**7
"""Rows of one file, at most."""


@dataclass(frozen=True, eq=False)
class TrialsDataset:
    """A data set whose files are whole.

    Attributes:
        folder: where it is.
        facts: what its `dataset.json` tells.
    """

    folder: Path
    facts: dict[str, Any]

    def table(self, columns: Sequence[str] | None = None, *, source: str | None = None) -> pa.Table:
        """The rows, in the order of the files.

        Args:
            columns: names, see `COLUMNS`; all by default.
            source: "plan runs" or "policy runs", for these rows alone.
        """
        names = sorted(name for name in self.facts["files"] if name.endswith(".parquet"))
        wanted = None if columns is None else list(dict.fromkeys([*columns, *(["source"] if source else [])]))
        table = pa.concat_tables(_read_file(self.folder / name, wanted) for name in names)
        table = table if source is None else table.filter(pc.equal(table["source"], source))
        return table if columns is None else table.select(list(columns))


def sample() -> TrialsDataset:
    """The small data set that ships with the package."""
    return open_dataset(SAMPLE)


def open_dataset(folder: str | Path) -> TrialsDataset:
    """Open a data set, and check all of its files.

    Raises:
        DataError: the folder is no data set of this version, or a file is missing, foreign, too large or damaged.
    """
    folder = Path(folder)
    facts = _read_facts(folder / FACTS)
    for name, told in facts["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != told["bytes"] or sha256(path) != told["sha256"]:
            raise DataError(
                f"{path} is missing or damaged: {FACTS} tells another size or sha256. Copy the data set again."
            )
        if told["bytes"] > MOST_FILE:
            raise DataError(f"{path} has {told['bytes']} bytes; at most {MOST_FILE} are read.")
        if path.suffix == ".parquet":
            _check_rows(path, told["rows"])
    return TrialsDataset(folder, facts)


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path.parent} is no data set of rankpilot: it has no {FACTS}. rankpilot dataset writes one.")
    try:
        facts = read_json(path, MOST_FACTS)
        if facts["format"] != FORMAT or facts["schema"] != SCHEMA:
            raise ValueError(f"it has format {facts['format']!r} and schema {facts['schema']!r}")
        if (facts["module_features"], facts["run_features"]) != (list(MODULE_FEATURES), list(RUN_FEATURES)):
            raise ValueError("policies saw other features then")
        for name, told in facts["files"].items():
            if not _NAMES.fullmatch(name):
                raise ValueError(f"no data set has a file {name!r}")
            _ = int(told["bytes"]), str(told["sha256"])
        rows = [int(told["rows"]) for name, told in facts["files"].items() if name.endswith(".parquet")]
        if sum(rows) != facts["rows"] or not facts["rows"] or not isinstance(facts["sources"], list):
            raise ValueError("its files do not have the rows that it tells")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is not that of a data set of schema {SCHEMA} ({type(error).__name__}: {first_line(error)}). Make "
            "the data set again, or use the version of rankpilot that wrote it."
        ) from error
    return dict(facts)


def _check_rows(path: Path, rows: int) -> None:
    """Refuse a file that has other columns than ours, or rows that do not fit into memory."""
    found = check_parquet(path, _limits())
    schema = found.schema.to_arrow_schema()
    if found.num_rows != rows or not schema.equals(SCHEMA_OF_FILES):
        raise DataError(
            f"{path} does not hold {rows} rows of schema {SCHEMA}: it has {found.num_rows} rows of {len(schema)} "
            "columns."
        )


def _read_file(path: Path, columns: list[str] | None) -> pa.Table:
    unknown = sorted(set(columns or ()) - set(SCHEMA_OF_FILES.names))
    if unknown:
        raise DataError(f"There are no columns {', '.join(unknown)}; there are {', '.join(SCHEMA_OF_FILES.names)}.")
    return read_parquet(path, _limits(), columns)


def _limits() -> ParquetLimits:
    return ParquetLimits(MOST_FILE, MOST_ROWS, 2 * len(SCHEMA_OF_FILES), MOST_UNPACKED)
