"""Stored rows of the methods benchmark: JSON lines that grow as work is done, and one small file in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...common.files import append_json_line, atomic_path, parse_json, read_json_lines
from ...common.parquet_files import ParquetLimits, read_parquet
from ...errors import ConfigError, first_line
from .work import Work

PACKED = Path(__file__).parent.parent / "results" / "methods.parquet"
"""The rows that ship with the repository."""

MOST_BYTES = 5 * 1024**2
"""Size of a packed file at most."""


LIMITS = ParquetLimits(file_bytes=4 * MOST_BYTES, rows=10**6, columns=2, memory_bytes=2**30)


class RowStore:
    """Rows by the key of their work.

    Args:
        folder: `rows.jsonl` in it is read and grows; None for a store that is only read.
        packed: a packed file to begin with.

    Raises:
        ConfigError: there is no such packed file, or one of the two holds no rows.
    """

    def __init__(self, folder: Path | None, packed: Path | None = None) -> None:
        self._path = None if folder is None else folder / "rows.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        if packed is not None:
            self._rows |= _unpacked(packed)
        for line in read_json_lines(self._path) if self._path else []:
            self._rows[_text(line["work"])] = line["row"]

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, work: Work) -> dict[str, Any] | None:
        """The row of a piece of work; None if there is none yet."""
        return self._rows.get(_text(work.key))

    def add(self, work: Work, row: dict[str, Any]) -> None:
        """Keep a row."""
        self._rows[_text(work.key)] = row
        if self._path:
            append_json_line(self._path, {"work": work.key, "row": row})

    def pack(self, path: Path, works: set[Work] | None = None) -> int:
        """Write rows into one compressed file; returns its bytes.

        Args:
            path: of the file.
            works: whose rows; None for all.

        Raises:
            ConfigError: the file would be larger than `MOST_BYTES`.
        """
        keys = sorted(self._rows if works is None else {_text(work.key) for work in works} & set(self._rows))
        table = pa.table({"work": keys, "row": [_text(self._rows[key]) for key in keys]})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", compression_level=19, use_dictionary=False)
            size = temporary.stat().st_size
            if size > MOST_BYTES:
                raise ConfigError(f"The rows take {size:,} bytes packed, and {MOST_BYTES:,} are allowed.")
        return size


def _unpacked(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"There is no packed file of rows {path}. `rankpilot bench methods --pack FILE` writes one.")
    try:
        table = read_parquet(path, LIMITS)
        texts = {name: table[name].to_pylist() for name in ("work", "row")}
        rows = {key: parse_json(row) for key, row in zip(texts["work"], texts["row"], strict=True)}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no packed file of rows: {first_line(error)}") from error
    if not all(isinstance(key, str) and isinstance(row, dict) for key, row in rows.items()):
        raise ConfigError(f"{path} is no packed file of rows: a row in it is no JSON object.")
    return rows


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
