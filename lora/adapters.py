"""The interface through which ranks are decided, for a PEFT model's adapters and for one run of stacked adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..common.arrays import IntArray
from .peft_config import sync_config
from .resize import non_finite, set_ranks
from .signals import Meter, SignalMeter
from .targets import TargetModule


class Adapters(Protocol):
    """The adapters of one run."""

    @property
    def targets(self) -> Sequence[TargetModule]:
        """The target modules: names, shapes, scaling. Read ranks from `ranks`: stacked runs share these objects."""

    @property
    def meter(self) -> Meter:
        """Measures the signals of these adapters."""

    @property
    def ranks(self) -> IntArray:
        """Current ranks, int64 (modules,)."""

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """Give the modules new ranks, int64 (modules,), and map the optimiser's state; stacked adapters ignore it.

        `seed` and `step`, the number of optimiser steps done, decide fresh directions.
        """

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Names of modules whose factors, gradients or optimiser state hold NaN or infinity."""


class PeftAdapters:
    """The adapters of a PEFT model, on these target modules."""

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        self.model = model
        self.targets: list[TargetModule] = list(targets)
        self.meter: SignalMeter = SignalMeter(targets)

    @property
    def ranks(self) -> IntArray:
        """Current ranks, int64 (modules,)."""
        return np.array([target.rank for target in self.targets], dtype=np.int64)

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """See `Adapters`."""
        plan = {target.name: rank for target, rank in zip(self.targets, ranks.tolist(), strict=True)}
        set_ranks(self.targets, plan, optimizer, seed=seed, step=step)
        sync_config(self.model, self.targets)
        self.meter.restart()

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """See `Adapters`."""
        return non_finite(self.targets, optimizer)
