"""What the footer of a Parquet file tells of its column chunks, read without Arrow.

Arrow 26.0 ends the process, in C++, when `RowGroupMetaData.column` meets size statistics that do not fit their column.
A footer is a struct in Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift, parquet.thrift of Apache
Parquet); of all that is in it two numbers of each chunk are wanted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

_MAGIC = b"PAR1"

_ROW_GROUPS, _COLUMNS, _META_DATA, _NUM_VALUES, _UNCOMPRESSED = 4, 1, 3, 5, 6
"""Numbers of the fields of FileMetaData, RowGroup, ColumnChunk and, two of them, of ColumnMetaData."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(1, 14)
"""The types of the compact protocol."""

_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
"""Bytes of the types that always take as many."""

MOST_FOOTER = 2**22
"""Bytes of a footer, at most: enough for tens of thousands of chunks."""

_DEEPEST = 32
"""Structs and lists inside one another; Parquet's go to ten."""


def column_chunks(path: Path) -> list[tuple[int, int]]:
    """The number of values and the bytes before compression of each chunk, as the footer tells them.

    Raises:
        OSError: the file cannot be read.
        DataError: it has no such footer.
    """
    with path.open("rb") as file:
        footer = _footer(path, file)
    try:
        groups = _Reader(footer).struct(0)[_ROW_GROUPS]
        chunks = [chunk[_META_DATA] for group in groups for chunk in group[_COLUMNS]]
        return [(int(chunk[_NUM_VALUES]), int(chunk[_UNCOMPRESSED])) for chunk in chunks]
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(f"{path} is corrupt: its footer cannot be read.") from error


def _footer(path: Path, file: BinaryIO) -> bytes:
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > min(size - 8, MOST_FOOTER):
        raise DataError(f"{path} is no Parquet file, is cut short, or has a footer of more than {MOST_FOOTER:,} bytes.")
    file.seek(size - 8 - length)
    return file.read(length)


class _Reader:
    """Reads values of the compact protocol in turn; IndexError or ValueError where bytes make no sense.

    Args:
        data: all of them.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def struct(self, depth: int) -> dict[int, Any]:
        """The fields of a struct by their numbers."""
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            kind = header & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("too deep")
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _STRUCT:
            return self.struct(depth)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            header = self._byte()
            count = header >> 4 if header >> 4 < 15 else self._varint()
            return [self._element(header & 15, depth + 1) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [[self._element(part, depth + 1) for part in (kinds >> 4, kinds & 15)] for _ in range(count)]
        return self._bytes(_FIXED[kind])

    def _element(self, kind: int, depth: int) -> Any:
        """A value in a list, where truth values take a byte."""
        return self._byte() if kind in (_TRUE, _FALSE) else self._value(kind, depth)

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise IndexError("cut short")
        return self.data[self.at - count : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
