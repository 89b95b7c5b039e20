"""Small models for tests of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rankpilot.data.workload import Workload, load_workload

from .small_models import save, write_rows

ModelFolder = Callable[..., str]
WorkloadOf = Callable[..., Workload]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The folder of a small model by name, saved once; with `chat`, its tokenizer has a chat template."""
    root: Path = tmp_path_factory.mktemp("small-models")

    def folder(name: str, *, chat: bool = False) -> str:
        path = root / f"{name}-{chat}"
        return str(path) if path.exists() else save(name, path, chat=chat)

    return folder


@pytest.fixture
def workload_of(model_folder: ModelFolder, tmp_path: Path) -> WorkloadOf:
    """Rows of data as a small model reads them; with `chat`, its tokenizer has a chat template."""

    def load(model: str, rows: Iterable[Mapping[str, Any]], *, chat: bool = False, **options: Any) -> Workload:
        return load_workload(model_folder(model, chat=chat), write_rows(tmp_path / "rows.jsonl", rows), **options)

    return load
