"""Run folders: one run each, never overwritten by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from .files import read_json, write_json

CONFIG = "config.json"


def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Claim a run folder.

    Args:
        folder: the run's folder.
        config: what the run does, as JSON values; written there.
        resume: go on with what is there; the settings must be the same.

    Raises:
        RunFolderError: it holds another run, or one with other settings.
    """
    path = folder / CONFIG
    if not folder.exists() or not any(folder.iterdir()):
        write_json(path, config)
        return
    if not resume:
        raise RunFolderError(f"{folder} exists already. Pass --resume to go on with it, or another --output.")
    if not path.exists():
        raise RunFolderError(f"{folder} is not empty and holds no {CONFIG}, so it is no run of rankpilot's.")
    previous = read_json(path)
    differing = sorted(key for key in {*previous, *config} if previous.get(key) != config.get(key))
    if differing:
        shown = "; ".join(f"{key}: {previous.get(key)!r} there, {config.get(key)!r} now" for key in differing[:3])
        raise RunFolderError(f"{folder} was started with other settings ({shown}). Use those, or another --output.")
