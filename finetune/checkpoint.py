"""What rankpilot adds to a Trainer's checkpoint: two files, of which the JSON file is written last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..common.files import atomic_path, read_json, write_json
from ..errors import RunFolderError

STATE, TENSORS = "rankpilot.json", "rankpilot.safetensors"

FORMAT = 2
"""Version of the files. It rises when older checkpoints cannot be read any more."""


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint were written."""
    return (checkpoint / STATE).is_file()


def save_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run into a checkpoint folder.

    Args:
        checkpoint: the folder.
        state: dictionaries, to any depth, of tensors, arrays and JSON values.
    """
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
