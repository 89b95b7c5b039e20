"""Checkpoints of a training of policies: what `restore` takes is whole, and unpacks to no more than it is."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from rankpilot.errors import RunFolderError
from rankpilot.training.train import Validation, restore, write_checkpoint

from ..training.test_train import learner
from .damage import damaged
from .running import fuzz

DONE = 3
"""Iterations of the checkpoint."""

ENVS: Any = None
"""Those of a validation of no tasks."""


model = cache(lambda: learner(8))


@cache
def whole() -> bytes:
    """A checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name) / "checkpoint.pt", model(), DONE, Validation((), ENVS))
        return (Path(name) / "checkpoint.pt").read_bytes()


def restored(path: Path) -> int:
    """The iterations done, with all random numbers as they were before."""
    state = np.random.get_state()  # noqa: NPY002  (SB3 shuffles with it)
    with torch.random.fork_rng():
        try:
            return restore(path, model(), Validation((), ENVS))
        finally:
            np.random.set_state(state)  # noqa: NPY002


@fuzz(st.deferred(lambda: damaged(whole())), examples=60)
def test_checkpoints_of_trainings(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "checkpoint.pt").write_bytes(content)
        assert restored(Path(name) / "checkpoint.pt") == DONE


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with ZipFile(io.BytesIO(whole())) as plain, ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
        packed.writestr("archive/data/huge", bytes(2**24))
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt is torn"):
        restored(path)
    path.write_bytes(whole())
    assert restored(path) == DONE
