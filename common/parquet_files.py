"""Parquet files that a stranger may have made: what they say of their size is checked before rows are read.

Parquet packs well: a few bytes can stand for a long column of one value, or for the same text a million times. So the
rows and values that a file's footer tells are bounded as well as its bytes, and texts are first read as references to
distinct texts, whose full size is worked out before they are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import DataError, first_line
from .parquet_footer import column_chunks

_FAULTS = (pa.ArrowException, OSError, ValueError, TypeError, LookupError)


@dataclass(frozen=True)
class ParquetLimits:
    """What a file may hold at most.

    Attributes:
        file_bytes: of the file itself.
        rows: in all.
        columns: leaves, in a schema with lists.
        memory_bytes: of all values, as they are in memory.
    """

    file_bytes: int
    rows: int
    columns: int
    memory_bytes: int


def read_parquet(path: Path, limits: ParquetLimits, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a file.

    Args:
        path: of the file, whatever the names of the folders around it look like.
        limits: refuse what is larger.
        columns: names; all by default.

    Raises:
        OSError: there is no such file.
        DataError: it is no Parquet file, damaged, or larger than the limits.
    """
    size = path.stat().st_size
    if not path.is_file() or size > limits.file_bytes:
        raise DataError(f"{path} is no file, or has more than {limits.file_bytes:,} bytes, the most that is read.")
    try:
        with pq.ParquetFile(path) as file:
            _check_footer(path, file, limits)
            kinds = {field.name: field.type for field in file.schema_arrow}
            leaves = [file.schema.column(number) for number in range(file.metadata.num_columns)]
            texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            table = file.read(columns if columns is None else list(columns), use_threads=False)
        for index, name in enumerate(table.column_names):
            if table.schema.field(index).type != kinds[name]:
                column = _written_out(path, table.column(index), kinds[name], limits)
                table = table.set_column(index, table.schema.field(index).with_type(kinds[name]), column)
        table.validate(full=True)
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"{path} is corrupt, or no Parquet file: {first_line(error)}") from error
    return table


def check_parquet(path: Path, limits: ParquetLimits) -> pq.FileMetaData:
    """What a file's footer tells, checked against the limits; see `read_parquet`."""
    try:
        with pq.ParquetFile(path) as file:
            _check_footer(path, file, limits)
            return file.metadata
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"{path} is corrupt, or no Parquet file: {first_line(error)}") from error


def _check_footer(path: Path, file: pq.ParquetFile, limits: ParquetLimits) -> None:
    told, names = file.metadata, file.schema_arrow.names
    if told.num_columns > limits.columns or told.num_rows > limits.rows or len(set(names)) < len(names):
        raise DataError(
            f"{path} has {told.num_rows:,} rows and {told.num_columns:,} columns; at most {limits.rows:,} rows and "
            f"{limits.columns:,} columns are read, each under a name of its own."
        )
    taken = sum(max(size, 8 * values, 0) for values, size in column_chunks(path))
    if taken > limits.memory_bytes:
        raise DataError(f"{path} would take {taken:,} bytes in memory; at most {limits.memory_bytes:,} are read.")


def _written_out(path: Path, column: pa.ChunkedArray, kind: pa.DataType, limits: ParquetLimits) -> pa.ChunkedArray:
    """A column of texts, or of lists of them, from references to distinct ones."""
    taken, nested = 0, pa.types.is_list(column.type)
    for chunk in (pc.list_flatten(column) if nested else column).chunks:
        lengths = pc.binary_length(chunk.dictionary)
        taken += pc.sum(pc.cast(pc.take(lengths, chunk.indices), pa.int64())).as_py() or 0
    if taken > limits.memory_bytes:
        raise DataError(f"The texts of {path} would take {taken:,} bytes; at most {limits.memory_bytes:,} are read.")
    return column.cast(kind)
