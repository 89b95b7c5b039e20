"""Files are whole or absent; and JSON, YAML with plain values alone, and arrays, out of files of strangers."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rankpilot.common import files
from rankpilot.common.errors import DataError
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors


def test_a_file_appears_with_its_folder_and_changes_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "down" / "note.txt"
    files.write_text(path, "Grüße\n")
    assert path.read_text(encoding="utf-8") == "Grüße\n"
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "Grüße\n", "until the block ends"
    assert path.read_text() == "new"

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "policy"
    for name in ("first", "second"):
        with files.atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    path.mkdir()

    def stopped(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", stopped)
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path) as temporary:
        temporary.mkdir()
    assert list(tmp_path.iterdir()) == [path]


def test_json_there_and_back_but_none_that_others_could_not_read(tmp_path):
    path, value = tmp_path / "value.json", {"a": [1, 2.5, None], "b": "ü"}
    files.write_json(path, value)
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(path, {"loss": number})
    assert files.read_json(path) == value
    assert path.read_text().endswith("}\n")


def test_a_torn_line_is_skipped_and_the_lines_after_it_are_not_lost(tmp_path):
    """As when a run is killed in the middle of a write and goes on."""
    path = tmp_path / "run" / "log.jsonl"
    assert files.read_json_lines(path) == []
    files.append_json_line(path, {"step": 0})
    with path.open("a") as stream:
        stream.write('{"step": 1, "lo')
    assert files.read_json_lines(path) == [{"step": 0}]
    files.append_json_line(path, {"step": 2})
    files.append_json_line(path, {"step": 3})
    assert [row["step"] for row in files.read_json_lines(path)] == [0, 2, 3]


def test_line_separators_inside_a_value_do_not_tear_it(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"text": "one\u2028two\u0085three\x0cfour\nfive"}
    files.append_json_line(path, row)
    assert files.read_json_lines(path) == [row]


# Files of strangers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "is not valid JSON: It is nested too deeply"),
        (b'{"a": "\\ud800"}', "is not valid JSON: It contains half of a surrogate pair"),
        (b"1" * 5000, "is not valid JSON: Exceeds the limit"),
        (b"\xff", "is not UTF-8 text"),
        (b"{", "is not valid JSON: Expecting"),
        (b" " * 101, "exceeds 100 bytes"),
    ],
)
def test_what_is_no_json_is_one_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=words):
        files.read_json(tmp_path / "file", 100 if "100 bytes" in words else 10**6)


def test_pairs_of_surrogates_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert files.read_json(tmp_path / "file") == {"a": "\N{GRINNING FACE}"}


def test_a_device_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(DataError, match="exceeds 1,000 bytes"):
        files.read_bytes(Path("/dev/zero"), 1000)


@pytest.mark.parametrize("content", ["[]", "5", '"x"'])
def test_values_without_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match="must be a mapping of names to values"):
        files.read_object(tmp_path / "file")


def test_what_people_write() -> None:
    text = "model: m\nsteps: 5\nrate: 1.0e-4\nlist: [1, two, null]\nnested:\n  deep: {a: true}\n"
    values = {"model": "m", "steps": 5, "rate": 1e-4, "list": [1, "two", None], "nested": {"deep": {"a": True}}}
    assert files.parse_yaml(text) == values
    assert files.parse_yaml('{"json": [1, 2.5, "x"]}') == {"json": [1, 2.5, "x"]}
    assert files.parse_yaml("") is None


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x", "a: &x {b: 1}\nc:\n  <<: *x", "&a [*a]"])
def test_references_are_refused_with_their_place(text: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError, match=r"references .* are not supported") as caught:
        files.parse_yaml(text)
    assert caught.value.problem_mark is not None


@pytest.mark.parametrize(
    "text",
    [
        *("!!python/name:os.system", "!!python/object/new:os.system [ls]", "!x y", "!!int ''", "!!bool x", "\x00"),
        *("[" * 2000, "a: 2001-99-99", "{[1]: 2}", "1" * 5000),
    ],
)
def test_tags_that_ask_for_objects_and_faults_of_the_library_are_its_own_errors(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        files.parse_yaml(text)


def test_arrays_and_texts_come_back(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array([True, False]), "c": np.zeros((0, 5), dtype=np.float32)}
    save_file(arrays, tmp_path / "file", metadata={"key": "text"})
    found, described = files.read_arrays(tmp_path / "file")
    assert described == {"key": "text"}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100, (10).to_bytes(8, "little") + b"{}"])
def test_what_is_no_file_of_tensors(tmp_path: Path, content: bytes) -> None:
    """Or of types that numpy does not have."""
    (tmp_path / "file").write_bytes(content)
    save_tensors({"a": torch.zeros(2).bfloat16()}, tmp_path / "bfloat16")
    for name in ("file", "absent", "bfloat16"):
        with pytest.raises(DataError, match="as arrays"):
            files.read_arrays(tmp_path / name)


def test_pickles_and_large_files_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(pickle.dumps({}))
    torch.save({}, tmp_path / "zip")
    for name in ("pickle", "zip"):
        with pytest.raises(DataError, match="pickle or zip file in disguise"):
            files.check_tensor_file(tmp_path / name)
    for length in (128, 0x4B50):  # of a header, whose first bytes are then those of a pickle and of a zip file
        text = ("x" * 20_000)[: length - 34]
        save_file({}, tmp_path / "file", metadata={"key": text})
        content = (tmp_path / "file").read_bytes()
        assert content.startswith((b"\x80", b"PK"))
        assert files.read_arrays(tmp_path / "file")[1] == {"key": text}
    (tmp_path / "file").write_bytes(bytes(101))
    files.check_tensor_file(tmp_path / "file", 101)
    with pytest.raises(DataError, match="exceeds 100 bytes"):
        files.check_tensor_file(tmp_path / "file", 100)
    with pytest.raises(DataError, match="is not a file"):
        files.check_tensor_file(tmp_path)
