"""Run folders: one run each, never overwritten by another, and used by one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import RunFolderError, shown
from .files import read_object, write_json
from .termination import Terminated

CONFIG = "config.json"

LOCK = ".lock"
"""File in the folder that the process which uses it has locked. The system frees the lock when the process ends."""


@contextmanager
def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Claim a run folder for as long as the block lasts.

    Args:
        folder: the run's folder.
        config: what the run does, as JSON values; written there.
        resume: go on with what is there; the settings must be the same.

    Raises:
        RunFolderError: it holds another run or one with other settings, it is a file, or another process uses it.
    """
    refuse_file(folder)
    # A run that wrote no settings has left nothing but its lock.
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        _check(folder, config, resume)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFolderError(
            f"Another process works in {folder}. Wait until it ends, or pass another --output."
        ) from error
    try:
        if (folder / CONFIG).exists():
            _check(folder, config, resume)  # once more: another process may have been faster
        else:
            write_json(folder / CONFIG, config)
        yield
    except (KeyboardInterrupt, Terminated) as end:
        end.add_note("The same command with --resume continues from here.")
        raise
    finally:
        lock.release()


def refuse_file(folder: Path) -> None:
    """Raise RunFolderError where a folder is to be and a file is."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file. Pass the name of a folder as --output.")


def _check(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that does not hold this run."""
    if not resume:
        raise RunFolderError(f"{folder} exists already. Pass --resume to go on with it, or another --output.")
    path = folder / CONFIG
    if not path.exists():
        raise RunFolderError(f"{folder} is not empty and holds no {CONFIG}, so it is no run of rankpilot's.")
    try:
        previous = read_object(path)
    except ValueError as error:
        raise RunFolderError(f"This version of rankpilot cannot go on with {path}: {error}") from error
    differing = sorted(key for key in {*previous, *config} if previous.get(key) != config.get(key))
    if differing:
        told = "; ".join(
            f"{key:.80}: {shown(previous.get(key))} there, {shown(config.get(key))} now" for key in differing[:3]
        )
        raise RunFolderError(f"{folder} was started with other settings ({told}). Use those, or another --output.")
