"""Files that `torch.save` wrote and a stranger may have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch

from ..errors import DataError


def is_whole_archive(path: Path) -> bool:
    """Whether a file that `torch.save` wrote is whole. It packs nothing, so no entry can be longer than the file.

    Raises:
        OSError, BadZipFile, NotImplementedError, RuntimeError, EOFError: it cannot be read as an archive.
    """
    with ZipFile(path) as archive:
        entries = archive.infolist()
        plain = all(entry.compress_type == ZIP_STORED for entry in entries)
        return plain and sum(entry.file_size for entry in entries) <= path.stat().st_size and not archive.testzip()


def load_archive(path: Path, device: torch.device | str = "cpu") -> Any:
    """Tensors, numbers and texts from a file that `torch.save` wrote; objects of other kinds are refused.

    Raises:
        DataError: an entry is torn, or unpacks to more than the file is long.
        Exception: whatever zipfile and torch raise for other files.
    """
    if not is_whole_archive(path):
        raise DataError(f"{path.name} is torn")
    return torch.load(path, map_location=device, weights_only=True)
