"""Ranks that move during training, as users of rankpilot get them in a loop of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from ....common.arrays import IntArray
from ....finetune.pilot import RankPilot
from ....finetune.run import TrainingRun
from ....lora.ladder import REFERENCE_RANK
from ....memory.recording import Batch
from ..loop import Driver
from ..method import Group
from ..study import Outcome, Study
from ..tasks import Cell
from ..work import Work, adapted_model
from .modules import module_names
from .policies import identity, load, schedule

MEASURE_EVERY = 50
"""Steps from one measured peak to the next."""


class PilotDriver(Driver):
    """The plain-loop API of rankpilot inside the loop of the benchmark; see `Driver`.

    Args:
        work: with the arguments policy, budget, seed, and perhaps `least`, a lower bound on all ranks, and
            `recompute`, whether layers may run again.
    """

    def __init__(self, work: Work) -> None:
        spec, least = work.get("policy"), work.get("least")
        names = module_names(work.task)
        bounds = None if least is None else dict.fromkeys(names, (least, 256))
        super().__init__(adapted_model(work.task, work.get("seed")), np.full(len(names), REFERENCE_RANK))
        self.pilot: RankPilot = RankPilot(
            load(spec),
            work.get("budget"),
            schedule=schedule(spec),
            seed=work.get("seed"),
            bounds=bounds,
            measure_every=MEASURE_EVERY,
            recompute=bool(work.get("recompute")),
            tell=lambda line: None,
        )

    def begin(self, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], steps: int) -> None:
        """Measure, probe, and apply the first plan."""
        self.pilot.begin(TrainingRun.of_loader(self.model, optimizer, loader, total_steps=steps))

    def before_step(self, batch: Batch) -> None:
        """Before the forward pass."""
        self.pilot.before_step(batch)

    def gradients(self, loss: torch.Tensor) -> None:
        """Gradients are there, and clipped."""
        self.pilot.before_optimizer_step(loss)

    def cleared(self, step: int) -> None:
        """Decide, where it is due."""
        self.pilot.after_step()

    def changes(self, step: int) -> bool:
        """Whether a decision is due."""
        assert self.pilot.controller is not None, "training has begun"
        return step < self.pilot.controller.total_steps and self.pilot.controller.due(step)

    def ranks(self) -> IntArray:
        """Current rank of each module."""
        assert self.pilot.controller is not None, "training has begun"
        return self.pilot.controller.ranks.copy()

    def buffer_bytes(self) -> int:
        """The averages of gradients from which signals come."""
        assert self.pilot.controller is not None, "training has begun"
        return int(self.pilot.controller.adapters.meter.buffer_bytes)

    def finish(self) -> dict[str, Any]:
        """Predicted and measured peaks, and steps above the budget."""
        pilot = self.pilot
        pilot.finish()
        peaks = [peak for _, peak in pilot.peaks]
        return {
            "predicted": max(cost for _, cost in pilot.predictions),
            "measured": max(peaks),
            "limit": pilot.limit,
            "breaches": sum(peak > pilot.limit for peak in peaks),
        }


@dataclass(frozen=True)
class Piloted:
    """A policy that decides before the first step and some times on the way.

    Attributes:
        name: see `Method`.
        policy: see `policies.load`.
        description: see `Method`.
        group: see `Method`.
        quick: see `Method`.
        least: lower bound on all ranks; None for none.
        recompute: whether layers may run again in the backward pass; None if not.
    """

    name: str
    policy: str
    description: str
    group: Group = "ours"
    quick: bool = False
    least: int | None = None
    recompute: Literal[True] | None = None

    def run(self, study: Study, cell: Cell, rate: float, seed: int) -> Work:
        """The training under the policy."""
        given = {"budget": cell.budget, "least": self.least, "recompute": self.recompute}
        return study.training(cell.task, "pilot", rate, seed, **given, **identity(self.policy))

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        return study.outcome(cell, lambda rate, seed: self.run(study, cell, rate, seed))
