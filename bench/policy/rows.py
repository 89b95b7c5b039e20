"""Rows of a policy's comparisons in one compressed file, with what was compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...agents.evaluation.results import Row
from ...common.files import atomic_path, parse_json
from ...common.parquet_files import ParquetLimits, read_parquet
from ...errors import ConfigError, DataError, first_line

PACKED = Path(__file__).parent.parent / "results" / "policy.parquet"
"""The rows that ship with the repository."""

LIMITS = ParquetLimits(file_bytes=2**24, rows=2**18, columns=40, memory_bytes=2**28)

_FACTS = b"rankpilot"


@dataclass(frozen=True, eq=False)
class PolicyRows:
    """Comparisons of one policy.

    Attributes:
        card: of the policy.
        rows: by the split of their tasks, "test" and "validation".
    """

    card: dict[str, Any]
    rows: dict[str, tuple[Row, ...]]


def pack(measured: PolicyRows, path: Path) -> int:
    """Write comparisons into one file; returns its bytes."""
    values = [{"split": split, **asdict(row)} for split, rows in sorted(measured.rows.items()) for row in rows]
    table = pa.Table.from_pylist(values).replace_schema_metadata({_FACTS: json.dumps({"card": measured.card})})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=19)
        return temporary.stat().st_size


def unpack(path: Path) -> PolicyRows:
    """The comparisons of a file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        table = read_parquet(path, LIMITS)
        card = parse_json((table.schema.metadata or {})[_FACTS].decode())["card"]
        rows: dict[str, list[Row]] = {}
        for values in table.to_pylist():
            rows.setdefault(values.pop("split"), []).append(Row(**values))
        if "test" not in rows:
            raise ValueError("it has no rows of the test split")
    except (OSError, DataError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no packed file of a policy's rows: {first_line(error)}") from error
    return PolicyRows(card, {split: tuple(found) for split, found in rows.items()})
