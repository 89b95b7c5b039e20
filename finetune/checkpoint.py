"""What rankpilot adds to a Trainer's checkpoint, and which checkpoint a run can go on from.

The two files of rankpilot are written first; the Trainer's own follow, of which `trainer_state.json` is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..common.files import atomic_path, read_json, write_json
from ..errors import RunFolderError

STATE, TENSORS = "rankpilot.json", "rankpilot.safetensors"

FORMAT = 3
"""Version of the files. It rises when older checkpoints cannot be read any more."""


TRAINER_STATE = "trainer_state.json"

_TRAINER_FILES = (TRAINER_STATE, "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def last_checkpoint(folder: Path, *, piloted: bool, tell: Callable[[str], None]) -> Path | None:
    """The latest checkpoint of which all files can be read; None if there is none.

    Args:
        folder: the Trainer's output folder.
        piloted: whether the run is under a policy, whose state is part of the checkpoint.
        tell: called with a line for each checkpoint that is passed over.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        fault = fault_of(path, piloted=piloted)
        if not fault:
            return path
        tell(f"{path.name} is passed over: {fault}")
    return None


def fault_of(checkpoint: Path, *, piloted: bool) -> str:
    """What is wrong with the files of a checkpoint, in a few words; empty if they are whole."""
    for name in (*_TRAINER_FILES, *((STATE, TENSORS) if piloted else ())):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.suffix == ".json":
                whole = isinstance(read_json(path), dict)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares the length of the file with its header
                    whole = True
            else:
                with ZipFile(path) as archive:
                    whole = archive.testzip() is None
        except (ValueError, SafetensorError, BadZipFile):
            whole = False
        if not whole:
            return f"{name} is torn"
    return ""


def save_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run into a checkpoint folder, before the Trainer writes its files.

    Args:
        checkpoint: the folder.
        state: dictionaries, to any depth, of tensors, arrays and JSON values.
    """
    (checkpoint / TRAINER_STATE).unlink(missing_ok=True)  # of an earlier save of this step: incomplete from now on
    values, tensors = _split(state)
    with atomic_path(checkpoint / TENSORS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(checkpoint / STATE, {"format": FORMAT, **values})


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; arrays come back as tensors.

    Raises:
        RunFolderError: the checkpoint was made without rankpilot or by another version, or was cut off while being
            written.
    """
    missing = [name for name in (STATE, TENSORS) if not (checkpoint / name).is_file()]
    if missing:
        raise RunFolderError(
            f"{checkpoint} holds no {missing[0]}: it was made without RankPilotCallback, or was cut off. Resume from "
            "an earlier checkpoint."
        )
    state: dict[str, Any] = read_json(checkpoint / STATE)
    if state.pop("format", 1) != FORMAT:
        raise RunFolderError(
            f"{checkpoint} was written by another version of rankpilot and cannot be resumed by this one. Resume with "
            "the version that wrote it, or start the run again in a new folder."
        )
    for name, tensor in load_file(checkpoint / TENSORS).items():
        *parents, last = name.split("/")
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = tensor
    return state


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON values of nested dictionaries, nested as before, and their tensors by path."""
    values: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor | np.ndarray):
            tensors[name] = torch.as_tensor(value)
        elif isinstance(value, Mapping):
            values[name], inner = _split(value)
            tensors |= {f"{name}/{path}": tensor for path, tensor in inner.items()}
        else:
            values[name] = value
    return values, tensors
