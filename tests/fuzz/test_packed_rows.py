"""Packed rows of the methods benchmark."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from rankpilot.bench.methods.rows import RowStore
from rankpilot.errors import ConfigError

from .damage import damaged, edited, edited_table
from .running import fuzz

ROWS = [{"work": [f"method {number}", number], "row": {"loss": 0.5, "ranks": [1, 2]}} for number in range(3)]


@cache
def packed() -> pa.Table:
    """Three rows as they are packed."""
    return pa.table({key: [json.dumps(row[key], sort_keys=True) for row in ROWS] for key in ("work", "row")})


def written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue().to_pybytes()


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A damaged packed file."""
    kind = draw(st.sampled_from(["bytes", "table", "rows"]))
    if kind == "bytes":
        return draw(damaged(written(packed())))
    if kind == "rows":
        row = json.dumps(draw(edited(ROWS[0]["row"])))
        return written(
            packed().set_column(
                1, "row", pa.array([row, "5", "{"][: draw(st.integers(1, 3))] * 3)[:3].cast(pa.string())
            )
        )
    try:
        return written(draw(edited_table(packed())))
    except pa.ArrowException:
        return written(packed())


@fuzz(files(), examples=100)
def test_packed_rows(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "packed.parquet"
        path.write_bytes(content)
        RowStore(None, path)


@pytest.mark.parametrize("row", ["5", "{", '"x"', "[" * 100_000])
def test_a_row_that_is_no_object(tmp_path: Path, row: str) -> None:
    path = tmp_path / "packed.parquet"
    path.write_bytes(written(packed().set_column(1, "row", pa.array([row] * 3))))
    with pytest.raises(ConfigError, match="is no packed file of rows"):
        RowStore(None, path)


def test_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "packed.parquet"
    path.write_bytes(written(packed().rename_columns(["work", "result"])))
    with pytest.raises(ConfigError, match="is no packed file of rows"):
        RowStore(None, path)


def test_more_rows_than_are_read(tmp_path: Path) -> None:
    path = tmp_path / "packed.parquet"
    path.write_bytes(written(pa.table({"work": pa.repeat("1", 1_100_000), "row": pa.repeat("{}", 1_100_000)})))
    assert path.stat().st_size < 2**16
    with pytest.raises(ConfigError, match="has 1,100,000 rows"):
        RowStore(None, path)
