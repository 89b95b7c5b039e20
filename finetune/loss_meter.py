"""The mean training loss between decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..common.processes import Processes
from ..common.stored_numbers import counted


class LossMeter:
    """Sums the losses of optimiser steps, without waiting for the device.

    Args:
        processes: whose losses count; by default those of this one alone.

    Attributes:
        total: the sum of the losses in this process, a float or a scalar tensor.
        count: the number of losses.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count: int = 0
        self._processes = processes or Processes()

    def add(self, loss: torch.Tensor | float) -> None:
        """Add the mean loss of one optimiser step."""
        self.total = self.total + (loss.detach().float().mean() if isinstance(loss, torch.Tensor) else loss)
        self.count += 1

    def restart(self) -> None:
        """Begin a new interval."""
        self.total, self.count = 0.0, 0

    def mean(self) -> float | None:
        """The mean loss of the interval over all processes, all of which call this; None if no loss was added."""
        sums = self._processes.of_each((float(self.total), self.count))
        count = sum(count for _, count in sums)
        return sum(total for total, _ in sums) / count if count else None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue within an interval, as JSON values; all processes call this."""
        sums = self._processes.of_each((float(self.total), self.count))
        whole = {"total": sum(total for total, _ in sums), "count": sum(count for _, count in sums)}
        return whole | ({"of_each": sums} if len(sums) > 1 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Of another number of processes the first takes all."""
        whole = [(state["total"], state["count"])]
        sums = state.get("of_each", whole)
        if len(sums) != self._processes.count:
            sums = whole + [(0.0, 0)] * (self._processes.count - 1)
        total, count = sums[self._processes.rank]
        self.total, self.count = float(total), counted(count)
