"""What decides ranks needs of adapters, whether they are one PEFT model's or a row of stacked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..common.arrays import FloatArray, IntArray
from .peft_config import sync_config
from .resize import non_finite, set_ranks
from .signals import SignalMeter
from .targets import TargetModule


class Meter(Protocol):
    """Signals of one run; see `SignalMeter`.

    Attributes:
        values: float64 (modules, len(SIGNALS)).
        age: int64 (modules,).
    """

    values: FloatArray
    age: IntArray

    def read(self) -> FloatArray:
        """Close the interval."""

    def restart(self) -> None:
        """Begin a new interval; call after each change of rank."""


class Adapters(Protocol):
    """The adapters of one run."""

    @property
    def targets(self) -> Sequence[TargetModule]:
        """Names, shapes and scaling of the target modules; their own ranks may be another run's."""

    @property
    def meter(self) -> Meter:
        """Reads their signals."""

    @property
    def ranks(self) -> IntArray:
        """Current ranks, int64 (modules,)."""

    def set_ranks(self, ranks: IntArray, optimizer: torch.optim.Optimizer | None, *, seed: int, step: int) -> None:
        """Give the modules new ranks.

        Args:
            ranks: int64 (modules,).
            optimizer: its state follows, unless the adapters keep their own.
            seed: with `step`, decides fresh directions.
            step: optimiser steps done.
        """

    def non_finite(self, optimizer: torch.optim.Optimizer | None) -> list[str]:
        """Names of modules that hold NaN or infinity."""


class PeftAdapters:
    """The adapters of a PEFT model.

    Args:
        model: the PEFT model.
        targets: its target modules.
    """

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        self.model = model
        self.targets = list(targets)
        self.meter = SignalMeter(targets)

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
