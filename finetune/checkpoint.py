"""Additions of rankpilot to a Trainer's checkpoint, and the choice of a checkpoint to resume from.

The two files of rankpilot are written first; the Trainer's own follow, ending with `trainer_state.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..common import files
from ..common.errors import ConfigError, DataError, RunFolderError, first_line, shown

logger = logging.getLogger(__name__)

STATE, TENSORS = "rankpilot.json", "rankpilot.safetensors"

MOST_STATE_BYTES = 2**40
"""Maximum bytes of the state's tensors, which grow with the model. No more is allocated than the length of the file."""

FORMAT = 5
"""Version of the file format, increased when older checkpoints become unreadable."""


TRAINER_STATE = "trainer_state.json"

MOST_PROCESSES = 2**16
"""Maximum number of processes in a run."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_RANDOM_STATES = "rng_state*.pth"
"""Random states of each process. With `save_only_model=True` there are none, and no optimizer or scheduler."""


def last_checkpoint(
    folder: str | Path, *, piloted: bool = True, tell: Callable[[str], None] = logger.warning
) -> Path | None:
    """Return the latest checkpoint whose files are all readable; None if there is none.

    A run that is killed or fills the disk may leave a damaged one behind.

    Args:
        folder: the Trainer's output folder; it need not exist.
        piloted: True if the run is under a policy, whose state is part of the checkpoint.
        tell: called with a line for each skipped checkpoint.

    Raises:
        ConfigError: the folder is no path.

    Example:
        >>> trainer.train(resume_from_checkpoint=rankpilot.last_checkpoint("output"))  # doctest: +SKIP
    """
    if not isinstance(folder, str | Path):
        raise ConfigError(f"A Trainer's output folder must be a path; got {shown(folder)}.")
    numbered = {path: path.name.rpartition("-")[2] for path in Path(folder).glob("checkpoint-*")}
    found = [path for path, number in numbered.items() if number.isdecimal() and path.is_dir()]
    for path in sorted(found, key=lambda path: -int(numbered[path])):
        fault = fault_of(path, piloted=piloted)
        if not fault:
            return path
        tell(f"skipping {path.name}: {fault}")
    return None


def chosen_checkpoint(resume: str | Path | bool | None, output: str | Path) -> str | Literal[True] | None:
    """Return the checkpoint a Trainer resumes from, given its argument `resume_from_checkpoint`.

    Args:
        resume: a folder, which must be complete; True for the last complete one; None or False for a new run.
        output: the Trainer's output folder.

    Raises:
        RunFolderError: the checkpoint, or each one in the output folder, is damaged or was made without rankpilot.
    """
    if resume is True:
        whole = last_checkpoint(output)
        if whole is None and any(Path(output).glob("checkpoint-*")):
            raise RunFolderError(f"No checkpoint to resume from. {way_out(Path(output))}")
        return str(whole) if whole else True  # without any checkpoint the Trainer reports it
    if not resume:
        return None
    fault = fault_of(Path(resume), piloted=True)
    if fault:
        raise RunFolderError(f"Cannot resume from {resume}: {fault}. {way_out(Path(resume).parent)}")
    return str(resume)


def way_out(folder: Path) -> str:
    """Return advice for a folder with a checkpoint that cannot be resumed."""
    whole = last_checkpoint(folder, tell=lambda _: None)
    if whole:
        return f"The last complete checkpoint is {whole}; pass it as resume_from_checkpoint."
    told = (
        f"No complete checkpoint with rankpilot's state was found in {folder}; others were cut off or "
        "written without rankpilot.attach. Start the run again."
    )
    plain = last_checkpoint(folder, piloted=False, tell=lambda _: None)
    if plain:
        told += (
            " To keep what an adapter has learned, give the Trainer the model "
            f"`PeftModel.from_pretrained(base, {str(plain)!r}, is_trainable=True)` and call `train()` without "
            "a checkpoint."
        )
    return told


def _files_of(checkpoint: Path, *, piloted: bool) -> Iterator[Path]:
    """Yield the files of a complete checkpoint."""
    yield checkpoint / TRAINER_STATE
    # Adapters with names other than "default" are in folders of those names.
    adapters = {path.parent for name in _ADAPTER_FILES for path in checkpoint.rglob(name)} or {checkpoint}
    yield from (folder / name for folder in sorted(adapters) for name in _ADAPTER_FILES)
    yield from (checkpoint / name for name in ((STATE, TENSORS) if piloted else ()))
    random_states = {path.name for path in checkpoint.glob(_RANDOM_STATES)}
    if random_states:
        count = _processes_of(checkpoint)
        random_states |= {f"rng_state_{rank}.pth" for rank in range(count)} if count > 1 else set()
        yield from (checkpoint / name for name in ("optimizer.pt", "scheduler.pt", *sorted(random_states)))


def _processes_of(checkpoint: Path) -> int:
    """Return the number of processes that wrote a checkpoint, each with its random states."""
    with suppress(OSError, ValueError, TypeError, OverflowError):
        count = int(files.read_object(checkpoint / STATE).get("processes", 1))
        return count if count <= MOST_PROCESSES else 1
    return 1


def fault_of(checkpoint: Path, *, piloted: bool) -> str:
    """Return the fault in a checkpoint's files, in a few words; empty if they are complete."""
    if not checkpoint.is_dir():
        return "the folder does not exist"
    for path in _files_of(checkpoint, piloted=piloted):
        name = path.relative_to(checkpoint)
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.suffix == ".json":
                whole = isinstance(files.read_json(path), dict)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares the length of the file with its header
                    whole = path.name != TENSORS or _is_as_written(checkpoint, files.read_object(checkpoint / STATE))
            else:
                whole = files.is_whole_archive(path)
        except (ValueError, SafetensorError, BadZipFile, NotImplementedError, RuntimeError, EOFError):
            whole = False
        if not whole:
            return f"{name} is corrupt"
    return ""


def _checksum(checkpoint: Path, values: Mapping[str, Any]) -> str:
    """Return the sha256 of these values and of the tensor file, in hexadecimal."""
    return sha256(json.dumps([values, files.sha256(checkpoint / TENSORS)]).encode()).hexdigest()


def _is_as_written(checkpoint: Path, state: dict[str, Any]) -> bool:
    """Check that tensors and values are as written; remove format and checksum from the values."""
    state.pop("format", None)
    return state.pop("checksum", None) in (None, _checksum(checkpoint, state))


def as_saved(value: Any) -> Any:
    """Return nested values with tensors for arrays and plain numbers, which `torch.load` reads with weights_only."""
    if isinstance(value, Mapping):
        return {name: as_saved(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_saved(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value.item() if isinstance(value, np.generic) else value


def save_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run into a checkpoint folder, before the Trainer writes its files.

    Args:
        checkpoint: the folder.
        state: dictionaries, nested to any depth, of tensors and JSON values.
    """
    (checkpoint / TRAINER_STATE).unlink(missing_ok=True)  # from an earlier save of this step, now incomplete
    values, tensors = _split(state)
    with files.atomic_path(checkpoint / TENSORS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    files.write_json(checkpoint / STATE, {"format": FORMAT, "checksum": _checksum(checkpoint, values), **values})


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state written by `save_state`.

    Raises:
        RunFolderError: the checkpoint was made without rankpilot or by another version, or its writing was interrupted.
    """
    missing = [name for name in (STATE, TENSORS) if not (checkpoint / name).is_file()]
    if missing:
        raise RunFolderError(
            f"{checkpoint} has no {missing[0]}: it was cut off, or written without rankpilot.attach. "
            f"{way_out(checkpoint.parent)}"
        )
    try:
        state = files.read_object(checkpoint / STATE)
    except DataError as error:
        raise RunFolderError(f"{error} {way_out(checkpoint.parent)}") from error
    if state.get("format", 1) != FORMAT:
        raise RunFolderError(
            f"{checkpoint} was written by another version of rankpilot and cannot be resumed by this one. Use "
            "that version, or start the run again in a new folder."
        )
    try:
        files.check_tensor_file(checkpoint / TENSORS, MOST_STATE_BYTES)
        if not _is_as_written(checkpoint, state):
            raise DataError("its contents have changed")
        tensors = load_file(checkpoint / TENSORS)
    except (ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(
            f"{checkpoint / TENSORS} is corrupt or not rankpilot's: {first_line(error)}. {way_out(checkpoint.parent)}"
        ) from error
    for name, tensor in tensors.items():
        *parents, last = name.split("/")
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise RunFolderError(f"{checkpoint / TENSORS} does not match {STATE}: unexpected tensor {shown(name)}.")
        place[last] = tensor
    return state


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Split nested dictionaries into JSON values, nested as before, and tensors by path."""
    values: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            values[name], inner = _split(value)
            tensors |= {f"{name}/{path}": tensor for path, tensor in inner.items()}
        else:
            values[name] = value
    return values, tensors
