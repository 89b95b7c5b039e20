"""The callback's own part of a checkpoint: two files next to the Trainer's, the JSON one written last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..allocation.controller import RankController
from ..allocation.probe import ProbeResult
from ..allocation.schedule import DecisionSchedule
from ..common.arrays import IntArray
from ..common.files import atomic_path, read_json, write_json
from ..errors import RunFolderError
from ..lora.adapters import PeftAdapters
from ..lora.targets import TargetModule
from ..memory.cost import ByteCost, Cost, ParameterCost
from .loss_meter import LossMeter
from .peak_guard import PeakGuard

STATE, TENSORS = "rankpilot.json", "rankpilot.safetensors"


@dataclass(frozen=True, eq=False)
class Flight:
    """A run's state at a checkpoint.

    Attributes:
        controller: ready to go on.
        loss_total: sum of the losses since the last decision.
        loss_count: how many they are.
        peaks: measured so far.
        predictions: one a decision so far.
        guard: for `PeakGuard.load`.
    """

    controller: RankController[PeftAdapters]
    loss_total: float
    loss_count: float
    peaks: list[tuple[int, int]]
    predictions: list[tuple[int, float]]
    guard: dict[str, Any]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint folder was written to its end."""
    return (checkpoint / STATE).is_file()


def save_flight(
    folder: Path,
    controller: RankController[PeftAdapters],
    losses: LossMeter,
    guard: PeakGuard,
    predictions: list[tuple[int, float]],
) -> None:
    """Write a run's state into a checkpoint folder."""
    cost = controller.cost
    tensors = {f"signals.{name}": value for name, value in controller.adapters.meter.state_dict().items()}
    tensors["signal_ranks"] = torch.from_numpy(controller.signal_ranks)
    scalars: dict[str, Any] = {}
    for field in fields(cost):  # type: ignore[arg-type]  # both kinds of cost are dataclasses
        value = getattr(cost, field.name)
        if isinstance(value, np.ndarray):
            tensors[f"cost.{field.name}"] = torch.from_numpy(value)
        else:
            scalars[field.name] = value
    with atomic_path(folder / TENSORS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    state = {
        "cost": type(cost).__name__,
        "cost_scalars": scalars,
        "limit": controller.limit,
        "total_steps": controller.total_steps,
        "decision": controller.decision,
        "first_loss": controller.first_loss,
        "interval_losses": controller.interval_losses,
        "seed": controller.seed,
        "loss_total": float(losses.total),
        "loss_count": losses.count,
        "peaks": guard.meter.history,
        "guard": guard.state(),
        "predictions": predictions,
    }
    write_json(folder / STATE, state)


def load_flight(
    folder: Path,
    model: nn.Module,
    targets: Sequence[TargetModule],
    schedule: DecisionSchedule,
    bounds: tuple[IntArray, IntArray],
) -> Flight:
    """Read what `save_flight` wrote; the adapters must have been loaded already.

    Args:
        folder: the checkpoint.
        model: the PEFT model.
        targets: its target modules.
        schedule: when decisions fall.
        bounds: least and largest rank of each module, int64 (modules,) each.

    Raises:
        RunFolderError: the checkpoint was made without rankpilot, or was cut off while being written.
    """
    missing = [name for name in (STATE, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise RunFolderError(
            f"{folder} holds no {missing[0]}: it was made without RankPilotCallback, or was cut off. Resume from an "
            "earlier checkpoint."
        )
    state, tensors = read_json(folder / STATE), load_file(folder / TENSORS)
    arrays = {name.removeprefix("cost."): t.numpy() for name, t in tensors.items() if name.startswith("cost.")}
    kinds: dict[str, type[Any]] = {"ByteCost": ByteCost, "ParameterCost": ParameterCost}
    scalars = {name: tuple(v) if isinstance(v, list) else v for name, v in state["cost_scalars"].items()}
    cost: Cost = kinds[state["cost"]](**arrays, **scalars)
    signals = {name.removeprefix("signals."): t for name, t in tensors.items() if name.startswith("signals.")}
    result = ProbeResult(signals["values"].numpy(), state["first_loss"])
    controller = RankController(
        PeftAdapters(model, targets),
        cost,
        state["limit"],
        schedule,
        state["total_steps"],
        result,
        low=bounds[0],
        high=bounds[1],
        seed=state["seed"],
    )
    controller.adapters.meter.load_state_dict(signals)
    controller.signal_ranks = tensors["signal_ranks"].numpy().copy()
    controller.decision = state["decision"]
    controller.interval_losses = list(state["interval_losses"])
    return Flight(
        controller,
        state["loss_total"],
        state["loss_count"],
        [(int(step), int(size)) for step, size in state["peaks"]],
        [(int(step), float(size)) for step, size in state["predictions"]],
        state["guard"],
    )
