"""Files are whole or absent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from rankpilot.common.files import (
    append_json_line,
    atomic_path,
    read_bytes,
    read_json,
    read_json_lines,
    read_object,
    sha256,
    write_json,
    write_text,
)
from rankpilot.errors import DataError


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_appears_with_its_folder(tmp_path):
    path = tmp_path / "deep" / "down" / "note.txt"
    write_text(path, "Grüße\n")
    assert path.read_text(encoding="utf-8") == "Grüße\n"
    write_text(path, "again")
    assert path.read_text() == "again"
    assert leftovers(path.parent) == []


def test_after_a_failure_the_old_content_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_until_the_block_ends_a_reader_sees_the_old_content(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "policy"
    for name in ("first", "second"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert leftovers(tmp_path) == []


def test_json_there_and_back(tmp_path):
    path = tmp_path / "value.json"
    value = {"a": [1, 2.5, None], "b": "ü"}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_that_others_could_not_read_is_refused(tmp_path, value):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": value})
    assert read_json(path) == 1


def test_lines_are_appended_and_a_torn_one_is_skipped(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    assert read_json_lines(path) == []
    for step in range(3):
        append_json_line(path, {"step": step})
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert [row["step"] for row in read_json_lines(path)] == [0, 1, 2]


def test_a_line_after_a_torn_one_is_not_lost(tmp_path):
    """A run that was killed in the middle of a write and goes on."""
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"step": 0})
    with path.open("a") as stream:
        stream.write('{"step": 1, "lo')
    append_json_line(path, {"step": 2})
    append_json_line(path, {"step": 3})
    assert [row["step"] for row in read_json_lines(path)] == [0, 2, 3]


def test_line_separators_inside_a_value_do_not_tear_it(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"text": "one\u2028two\u0085three\x0cfour\nfive"}
    append_json_line(path, row)
    assert read_json_lines(path) == [row]


def test_sha256(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 1000)
    assert sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


# Files of strangers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "is not valid JSON: It is nested too deeply"),
        (b'{"a": "\\ud800"}', "is not valid JSON: It has half of a surrogate pair"),
        (b"1" * 5000, "is not valid JSON: Exceeds the limit"),
        (b"\xff", "is no text in UTF-8"),
        (b"{", "is not valid JSON: Expecting"),
        (b" " * 101, "has more than 100 bytes"),
    ],
)
def test_what_is_no_json_is_one_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_json(tmp_path / "file", 100 if "100 bytes" in words else 10**6)


def test_pairs_of_surrogates_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "file") == {"a": "\N{GRINNING FACE}"}


def test_a_device_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        read_bytes(Path("/dev/zero"), 1000)


@pytest.mark.parametrize("content", ["[]", "5", '"x"'])
def test_values_without_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match="holds no values by name"):
        read_object(tmp_path / "file")
