"""Checkpoints of a custom training loop: trained tensors, optimizer, and the ranks with their history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..common import files
from ..common.checks import counted
from ..common.errors import DataError, RunFolderError, first_line
from ..cost.record.model_states import trained_outside
from ..lora.peft_config import resizable_targets
from ..lora.targets import TargetModule
from .checkpoint import MOST_STATE_BYTES, STATE, TENSORS, load_state, save_state
from .pilot import RankPilot
from .step.run import TrainingRun

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"

_OUTSIDE = "beside the model."
"""Prefix of the names of trained parameters outside the model; their index in the optimizer follows."""


def save_checkpoint(pilot: RankPilot, run: TrainingRun, folder: str | Path) -> None:
    """Save everything needed to resume a loop: trained tensors, the optimizer, and the ranks with their history.

    The learning rate schedule, the order of the batches and random states are left to the loop. All processes of a run
    call this, and the first one writes.

    Args:
        pilot: a pilot after `begin` or `resume`.
        run: the pilot's run.
        folder: a folder for this checkpoint only; an existing checkpoint is replaced.

    Raises:
        ConfigError: the run has not begun.
        RunFolderError: the folder holds something other than a checkpoint, which would be lost.

    Example:
        >>> rankpilot.save_checkpoint(pilot, run, "runs/loop/checkpoint")  # doctest: +SKIP
    """
    state, path = pilot.state_dict(), Path(folder).absolute()
    if not run.replicas.processes.first:
        return
    assert pilot.applier, "a pilot that tells its state has begun"
    _check_replaceable(path)
    with files.atomic_path(path) as temporary:
        temporary.mkdir()
        save_file(_trained(run, pilot.applier.targets), temporary / WEIGHTS)
        save_state(temporary, {**state, WEIGHTS: files.sha256(temporary / WEIGHTS)})
        torch.save(run.optimizer.state_dict(), temporary / OPTIMIZER)


def load_checkpoint(pilot: RankPilot, run: TrainingRun, folder: str | Path, *, name: str = "") -> int:
    """Resume from `save_checkpoint`, in place of `RankPilot.begin`; create the model as for a new run.

    Args:
        pilot: a pilot before `begin`.
        run: model, optimizer and data as created initially.
        folder: the folder of the checkpoint.
        name: the run's name in the decision log.

    Returns:
        The number of optimizer steps done.

    Raises:
        RunFolderError: the checkpoint is missing, damaged or from another run.
        BudgetError: no plan fits a changed budget.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"Checkpoint {folder} does not exist. Pass a folder written by `save_checkpoint`.")
    state = load_state(folder)
    targets = resizable_targets(run.model, pilot.options.scaling)
    try:
        files.check_tensor_file(folder / WEIGHTS, MOST_STATE_BYTES)
        if state.pop(WEIGHTS, None) not in (None, files.sha256(folder / WEIGHTS)):
            raise DataError(f"{WEIGHTS} has changed since it was written")
        weights = load_file(folder / WEIGHTS)
        moments = files.load_archive(folder / OPTIMIZER, "cpu")  # the optimizer moves state to the device
    except Exception as error:  # readers raise many errors on damaged or foreign files
        raise RunFolderError(f"Cannot read checkpoint {folder}: {first_line(error)}. Use an earlier one.") from error
    other = sorted(weights.keys() ^ _trained(run, targets).keys())
    if other:
        raise RunFolderError(
            f"Checkpoint {folder} belongs to another model: {len(other)} trainable parameters are missing in "
            f"one of the two, such as {other[0]}. Build model, adapters and optimizer as in the run that "
            "wrote it."
        )
    try:
        with torch.no_grad():
            for number, parameter in enumerate(trained_outside(run.model, run.optimizer)):
                parameter.copy_(weights.pop(f"{_OUTSIDE}{number}"))
        run.model.load_state_dict(weights, strict=False)
        run.optimizer.load_state_dict(moments)
        step = counted(state["step"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise RunFolderError(
            f"Checkpoint {folder} does not fit the model or the optimizer: {first_line(error)}. Build them as "
            "in the run that wrote it."
        ) from error
    pilot.resume(run, state, step=step, name=name)
    return step


def _check_replaceable(path: Path) -> None:
    """Raise RunFolderError if this path holds anything but a loop's checkpoint."""
    if not path.exists():
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if foreign := sorted(names - {WEIGHTS, OPTIMIZER, STATE, TENSORS}):
        raise RunFolderError(
            f"{path} contains files that are not a loop checkpoint, such as {foreign[0]}, and would be lost. "
            "Use a separate folder, such as 'checkpoint' inside this one."
        )


def _trained(run: TrainingRun, targets: Sequence[TargetModule]) -> dict[str, torch.Tensor]:
    """Return trained tensors by name, and all adapters, including those at rank 0."""
    adapters = {id(p) for target in targets for p in target.parameters.values()}
    parameters = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad or id(p) in adapters]
    outside = enumerate(trained_outside(run.model, run.optimizer))
    return {name: p.detach().contiguous() for name, p in [*parameters, *((f"{_OUTSIDE}{i}", p) for i, p in outside)]}
