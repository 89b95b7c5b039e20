"""The mean training loss between decisions."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class LossMeter:
    """Sums the losses of optimiser steps, without waiting for the device.

    Attributes:
        total: the sum of the losses, a float or a scalar tensor.
        count: the number of losses.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count = 0

    def add(self, loss: torch.Tensor | float) -> None:
        """Add the mean loss of one optimiser step."""
        self.total = self.total + (loss.detach().float().mean() if isinstance(loss, torch.Tensor) else loss)
        self.count += 1

    def restart(self) -> None:
        """Begin a new interval."""
        self.total, self.count = 0.0, 0

    def mean(self) -> float | None:
        """The mean loss of the interval; None if no loss was added."""
        return float(self.total) / self.count if self.count else None

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to continue within an interval, as JSON values."""
        return {"total": float(self.total), "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict`."""
        self.total, self.count = state["total"], int(state["count"])
