"""Files that are complete or absent, and text and JSON that are read within bounds.

Each file is written to a temporary name and then renamed. What is read may be a stranger's: see SECURITY.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line, shown

MOST_TEXT_BYTES = 2**26
"""Bytes of a text or JSON file, at most; more are refused before they are read."""

_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)

MOST_LINES_BYTES = 2**29
"""Bytes of a file of JSON lines, at most."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    It works for a file and for a folder; an existing file or folder of that name is replaced. A reader sees either the
    old content or the new one, never a part of it. While a folder is replaced, there is none for a moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = scratch / path.name
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rename(scratch / "replaced")
        temporary.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def as_plain(value: Any) -> Any:
    """A value of dicts, tuples, paths and scalars as it comes back from JSON: lists for tuples, text for paths."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file; of a pipe or a device no more than `most` is read either.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes.
    """
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise DataError(f"{path} has more than {most:,} bytes, which is the most that is read of such a file.")
    return content


def read_text(path: Path, most: int = MOST_TEXT_BYTES) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, or is no text in UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {first_line(error)}.") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested more deeply than Python reads, or has half of a surrogate pair in a text,
            which no file could be written with.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise DataError("It is nested too deeply.") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("It has half of a surrogate pair in a text.") from error
    return value


def read_json(path: Path, most: int = MOST_TEXT_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, or is no JSON.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {first_line(error)}") from error


def read_object(path: Path, most: int = MOST_TEXT_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds values by name.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, is no JSON, or holds something else.
    """
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no values by name: {shown(value)}.")
    return value


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object and flush it to disk.

    A last line that a killed process left incomplete is ended first; `read_json_lines` skips it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                stream.write(b"\n")
        stream.write((json.dumps(value) + "\n").encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON objects, one a line, in one step; NaN and infinity are refused."""
    write_text(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSON-lines file; an absent file counts as empty.

    Raises:
        DataError: it has more than `MOST_LINES_BYTES`, or is no text in UTF-8.
    """
    if not path.exists():
        return []
    rows = []
    for line in read_text(path, MOST_LINES_BYTES).splitlines():
        with suppress(ValueError):
            rows.append(parse_json(line))
    return rows


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
