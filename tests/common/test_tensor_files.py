"""Arrays from safetensors files: what comes back, and what is refused before it is opened."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from rankpilot.common.files import check_tensor_file, read_arrays
from rankpilot.errors import DataError
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors


def test_arrays_and_texts_come_back(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array([True, False]), "c": np.zeros((0, 5), dtype=np.float32)}
    save_file(arrays, tmp_path / "file", metadata={"key": "text"})
    found, described = read_arrays(tmp_path / "file")
    assert described == {"key": "text"}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn])
def test_types_that_numpy_does_not_have(tmp_path: Path, kind: torch.dtype) -> None:
    save_tensors({"a": torch.zeros(2).to(kind)}, tmp_path / "file")
    with pytest.raises(DataError, match="cannot be read as arrays"):
        read_arrays(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100, (10).to_bytes(8, "little") + b"{}"])
def test_what_is_no_file_of_tensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as arrays"):
        read_arrays(tmp_path / "file")
    with pytest.raises(DataError, match="cannot be read as arrays"):
        read_arrays(tmp_path / "absent")


def test_pickles_and_large_files_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(pickle.dumps({}))
    torch.save({}, tmp_path / "zip")
    for name in ("pickle", "zip"):
        with pytest.raises(DataError, match="pickle or zip file in disguise"):
            check_tensor_file(tmp_path / name)
    for length in (128, 0x4B50):  # of a header, whose first bytes are then those of a pickle and of a zip file
        text = ("x" * 20_000)[: length - 34]
        save_file({}, tmp_path / "file", metadata={"key": text})
        content = (tmp_path / "file").read_bytes()
        assert content.startswith((b"\x80", b"PK"))
        assert read_arrays(tmp_path / "file")[1] == {"key": text}
    (tmp_path / "file").write_bytes(bytes(101))
    check_tensor_file(tmp_path / "file", 101)
    with pytest.raises(DataError, match="more than 100 bytes"):
        check_tensor_file(tmp_path / "file", 100)
    with pytest.raises(DataError, match="is no file"):
        check_tensor_file(tmp_path)
