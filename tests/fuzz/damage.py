"""Damage: odd values, edits of JSON values and of bytes, and edits of files of tensors."""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NAMES = ["", ".", "..", "../../x", "/etc/passwd", "C:\\x", "a\x00b", "\ud800", "\x1b[31m", "x" * 10_000, "é", "٣"]

NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**9, 10**30, 10**400, 0.0, -0.5, 1e-320, 1e308]

odd_values = st.one_of(
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"": 1}, float("nan"), float("inf"), *NUMBERS, *NAMES]),
    st.integers(-3, 300),
    st.floats(width=32),
    st.text(max_size=12),
    st.lists(st.integers(-3, 70), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=2),
)
"""Values that a setting might have in a file, most of them wrong."""

Place = tuple[str | int, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The paths to all values inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@st.composite
def edited(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A JSON value with a few values replaced, removed, renamed, repeated or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        paths = list(places(value))
        if not paths:
            break
        # Values near the top are few among the many in long lists, and matter more.
        depth = draw(st.integers(1, max(map(len, paths))))
        *parents, last = draw(st.sampled_from([path for path in paths if len(path) <= depth] or paths))
        place = value
        for key in parents:
            place = place[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "wrap", "repeat", "swap"]))
        if kind == "replace":
            place[last] = copy.deepcopy(draw(odd_values))  # a later edit may change it
        elif kind == "remove":
            del place[last]
        elif kind == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(NAMES))] = place.pop(last)
        elif kind == "wrap":
            place[last] = [place[last]]
        elif kind == "repeat" and isinstance(place, list):
            place.extend([place[last]] * draw(st.integers(1, 5)))
        elif kind == "swap" and isinstance(place, dict):
            other = draw(st.sampled_from(sorted(place, key=repr)))
            place[last], place[other] = place[other], place[last]
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some flipped, cut out, put in, repeated or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 1000]))
        kind = draw(st.sampled_from(["set", "set", "set", "number", "cut out", "put in", "repeat", "cut off"]))
        if kind == "set":
            data[start : start + length] = draw(st.binary(min_size=length, max_size=length))[: len(data) - start]
        elif kind == "number":
            data[start : start + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])))
        elif kind == "cut out":
            del data[start : start + length]
        elif kind == "put in":
            data[start:start] = draw(st.binary(max_size=length))
        elif kind == "repeat":
            data[start:start] = data[start : start + length] * draw(st.integers(1, 3))
        else:
            del data[start:]
    return bytes(data)


def as_text(value: Any) -> bytes:
    """JSON as a file has it; lone surrogates stay escaped."""
    return json.dumps(value).encode()


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file whose values or bytes are damaged, or that is something else."""
    if draw(st.integers(0, 3)):
        return as_text(draw(edited(value)))
    if draw(st.booleans()):
        return draw(damaged(as_text(value)))
    deep = [b"[" * 100_000, b'{"a":' * 50_000]
    return draw(st.sampled_from([b"", *deep, b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"1" * 9999]))


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header, in which JSON texts are edited as values, or with damaged bytes."""
    if not draw(st.integers(0, 3)):
        return draw(damaged(content))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    texts = header.get("__metadata__", {})
    described = {key: json.loads(text) if text[:1] in ("[", "{") else text for key, text in texts.items()}
    changed = draw(edited(header | {"__metadata__": described} if described else header))
    if isinstance(metadata := changed.get("__metadata__"), dict):
        changed["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    text, tensors = as_text(changed), content[8 + length :]
    if draw(st.booleans()):  # other numbers
        tensors = draw(damaged(tensors))
    return len(text).to_bytes(8, "little") + text + tensors


Files = dict[str, bytes]
"""The content of a folder's files by their path in it."""


def files_of(write: Callable[[Path], object]) -> Files:
    """What a writer writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        return {str(path.relative_to(name)): path.read_bytes() for path in files}


def put(files: Files, folder: Path) -> Path:
    """Write the files; returns their folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def folder_of(files: Files) -> Iterator[Path]:
    """A folder with these files, alone in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as name:
        yield put(files, Path(name) / "folder")
