"""Small models for tests of data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .small_models import save

ModelFolder = Callable[..., str]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The folder of a small model by name, saved once; with `chat`, its tokenizer has a chat template."""
    root: Path = tmp_path_factory.mktemp("small-models")

    def folder(name: str, *, chat: bool = False) -> str:
        path = root / f"{name}-{chat}"
        return str(path) if path.exists() else save(name, path, chat=chat)

    return folder
