"""Parquet within limits: rows, columns, bytes, and texts that are written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rankpilot.common.parquet_files import ParquetLimits, check_parquet, read_parquet
from rankpilot.common.parquet_footer import MOST_FOOTER, column_chunks
from rankpilot.errors import DataError

LIMITS = ParquetLimits(file_bytes=10**6, rows=100, columns=10, memory_bytes=10**5)


@pytest.fixture
def table() -> pa.Table:
    return pa.table(
        {
            "text": ["a", None, "é" * 9, ""] * 5,
            "number": list(range(20)),
            "texts": [["a", "b"], [], None, ["c", None]] * 5,
            "numbers": pa.array([[0.5, 1.0]] * 20, pa.list_(pa.float32())),
            "nothing": pa.nulls(20),
        }
    ).replace_schema_metadata({b"key": b"value"})


@pytest.fixture
def path(tmp_path: Path, table: pa.Table) -> Path:
    pq.write_table(table, tmp_path / "seed=3.parquet")
    return tmp_path / "seed=3.parquet"


def test_rows_come_back_as_they_were(path: Path, table: pa.Table) -> None:
    found = read_parquet(path, LIMITS)
    assert found.equals(pq.ParquetFile(path).read(), check_metadata=True)
    assert found.to_pydict() == table.to_pydict()
    assert read_parquet(path, LIMITS, ["number", "texts"]).equals(found.select(["number", "texts"]))
    assert check_parquet(path, LIMITS).num_rows == 20


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"file_bytes": 100}, "more than 100 bytes"),
        ({"rows": 19}, "20 rows and 5 columns"),
        ({"columns": 4}, "20 rows and 5 columns"),
        ({"memory_bytes": 100}, "would take"),
    ],
)
def test_what_is_larger_is_not_read(path: Path, limit: dict[str, int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_parquet(path, replace(LIMITS, **limit))


@pytest.mark.parametrize("nested", [False, True])
def test_texts_are_counted_before_they_are_written_out(tmp_path: Path, nested: bool) -> None:
    long = ["x" * 9000] * 90
    column = pa.array([long], pa.list_(pa.string())) if nested else pa.array(long)
    pq.write_table(pa.table({"text": column}), tmp_path / "file")
    with pytest.raises(DataError, match=r"texts of .* would take 810,000 bytes"):
        read_parquet(tmp_path / "file", LIMITS)
    assert read_parquet(tmp_path / "file", replace(LIMITS, memory_bytes=10**6))["text"].type == column.type


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"\x00" * 50])
def test_what_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for read in (read_parquet, check_parquet):
        with pytest.raises(DataError, match="is corrupt, or no Parquet file"):
            read(tmp_path / "file", LIMITS)
    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "absent", LIMITS)
    with pytest.raises(DataError, match="is no file"):
        read_parquet(tmp_path, LIMITS)


def test_texts_that_are_not_utf8(tmp_path: Path) -> None:
    binary = pa.array([b"\xff\xfe"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, binary.buffers())}), tmp_path / "file")
    with pytest.raises(DataError, match="is corrupt"):
        read_parquet(tmp_path / "file", LIMITS)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "file")
    with pytest.raises(DataError, match="each under a name of its own"):
        read_parquet(tmp_path / "file", LIMITS)


def test_the_footer_tells_what_arrow_reads_in_it(tmp_path: Path, table: pa.Table) -> None:
    many = pa.concat_tables([table.append_column("struct", pa.array([{"a": 1.5, "b": [True]}] * 20))] * 30)
    pq.write_table(
        many,
        tmp_path / "file",
        row_group_size=7,
        write_page_index=True,
        column_encoding={"number": "PLAIN"},
        use_dictionary=["text"],
    )
    told = pq.ParquetFile(tmp_path / "file").metadata
    groups = [told.row_group(number) for number in range(told.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(told.num_columns)]
    assert len(chunks) > 500
    assert column_chunks(tmp_path / "file") == [(chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks]


def test_size_statistics_that_do_not_fit_their_column(tmp_path: Path) -> None:
    """Arrow 26.0 ends the process when it is asked for such a chunk."""
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    optional = b"\x25\x02\x18\x04text"
    assert content.count(optional) == 1
    (tmp_path / "file").write_bytes(content.replace(optional, b"\x25\x47\x18\x04text"))
    with pytest.raises(DataError, match="is corrupt"):
        read_parquet(tmp_path / "file", LIMITS)


def test_damaged_footers(tmp_path: Path, path: Path) -> None:
    content, generator = path.read_bytes(), np.random.default_rng(0)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    refused = 0
    for _ in range(2000):
        damaged = bytearray(content)
        damaged[generator.integers(start, len(content) - 8)] = generator.integers(256)
        (tmp_path / "file").write_bytes(damaged)
        try:
            assert all(isinstance(part, int) for chunk in column_chunks(tmp_path / "file") for part in chunk)
        except DataError:
            refused += 1
    assert 200 < refused < 1800


def test_a_footer_of_more_bytes_than_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(
        b"PAR1" + bytes(MOST_FOOTER + 1) + (MOST_FOOTER + 1).to_bytes(4, "little") + b"PAR1"
    )
    with pytest.raises(DataError, match=f"more than {MOST_FOOTER:,} bytes"):
        column_chunks(tmp_path / "file")
    nested = b"\x1c" * 100 + bytes(101)
    (tmp_path / "file").write_bytes(nested + len(nested).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="its footer cannot be read"):
        column_chunks(tmp_path / "file")
