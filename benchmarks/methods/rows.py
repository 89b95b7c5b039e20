"""Stored rows of the methods benchmark: JSON lines that grow as work is done, and one small file in the repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rankpilot.common.arrays import IntArray
from rankpilot.common.files import append_json_line, atomic_path, read_json_lines
from rankpilot.errors import ConfigError

from .tasks import MethodTask

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        kind: a name of `KINDS_OF_WORK`.
        task: what it is about.
        arguments: what else defines it, as (name, value) in the order of names.
    """

    kind: str
    task: MethodTask
    arguments: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, kind: str, task: MethodTask, **arguments: Value) -> Work:
        """A piece of work; arguments that are None are left out."""
        return cls(kind, task, tuple(sorted((name, value) for name, value in arguments.items() if value is not None)))

    def get(self, name: str) -> Any:
        """An argument; None if there is none of that name."""
        return dict(self.arguments).get(name)

    @property
    def key(self) -> list[Any]:
        """What names the row."""
        return [self.kind, self.task.key, dict(self.arguments)]

    def __str__(self) -> str:
        return f"{self.kind} {self.task.key} {dict(self.arguments)}"


PACKED = Path(__file__).parents[1] / "results" / "methods.parquet"
"""The rows that are kept in the repository."""

MOST_BYTES = 5 * 1024**2
"""Size of a packed file at most."""


class RowStore:
    """Rows by the key of their work.

    Args:
        folder: `rows.jsonl` in it is read and grows; None for a store that is only read.
        packed: a packed file to begin with.

    Raises:
        ConfigError: there is no such packed file.
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
        raise ConfigError(
            f"There is no packed file of rows {path}. `python -m benchmarks methods --pack FILE` writes one."
        )
    table = pq.read_table(path)
    return {
        key: json.loads(row) for key, row in zip(*(table[name].to_pylist() for name in ("work", "row")), strict=True)
    }


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def plan_text(ranks: Sequence[int] | IntArray) -> str:
    """The text of a plan, one rank for each module."""
    return " ".join(f"{rank}x{len(list(run))}" for rank, run in groupby(int(rank) for rank in ranks))


def plan_ranks(text: str) -> IntArray:
    """The plan of a text, int64 (modules,)."""
    runs = [tuple(map(int, run.split("x"))) for run in text.split()]
    return np.repeat([rank for rank, _ in runs], [count for _, count in runs]).astype(np.int64)
