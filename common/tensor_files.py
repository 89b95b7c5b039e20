"""Arrays with a description, from safetensors files that a stranger may have made.

A file's header tells the type and shape of each tensor, and the format's reader checks that together they take the
bytes that follow: so no more is allocated than the file is long.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import DataError, first_line
from .arrays import Arrays

MOST_TENSOR_BYTES = 2**31
"""Bytes of a file of tensors, at most."""

PICKLES = (b"PK", b"\x80")
"""How files begin that `torch.save` and `pickle` write, which are never opened."""


def check_tensor_file(path: Path, most: int = MOST_TENSOR_BYTES) -> None:
    """Refuse a file before it is opened as one of tensors.

    Raises:
        OSError: there is no such file.
        DataError: it is no file, has more than `most` bytes, or is a pickle.
    """
    size = path.stat().st_size
    if not path.is_file() or size > most:
        raise DataError(f"{path} is no file, or has more than {most:,} bytes, the most that is read of such a file.")
    with path.open("rb") as stream:
        head = stream.read(9)
    if head.startswith(PICKLES) and head[8:] != b"{":  # the header follows its length, whose bytes may be any
        raise DataError(f"{path} is a pickle or zip file in disguise and was not opened.")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a file, by name; only its header is read.

    Raises:
        DataError: the file is missing or no safetensors file.
    """
    try:
        check_tensor_file(path, most=2**63)
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as tensors: {first_line(error)}") from error


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """All arrays of a file by name, and the texts that describe them.

    Raises:
        DataError: the file is missing, too large, no safetensors file, or holds types that numpy does not have.
    """
    try:
        check_tensor_file(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file is no dict)
        return arrays, metadata
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as arrays: {first_line(error)}") from error
