"""What a run watches in each step: the losses since the last decision, and whether its adapters train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..common.checks import counted, is_real
from ..common.processes import Processes
from ..errors import ConfigError, NoGradientError, shown
from ..lora.resize import norms_of
from ..lora.targets import TargetModule

PATIENCE = 3
"""Looks in a row at which all gradients are zero, after which the run is stopped. One batch may have none: all of its
labels may be masked."""


class LossMeter:
    """Sums the losses of optimizer steps, without waiting for the device.

    Args:
        processes: whose losses count; by default those of this one alone.

    Attributes:
        total: the sum of the finite losses in this process, a float or a scalar tensor.
        count: their number.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count: torch.Tensor | int = 0
        self._processes = processes or Processes()

    def add(self, loss: torch.Tensor | float) -> None:
        """Add the mean loss of one optimizer step; a loss that is NaN, as where all labels are masked, is none."""
        if not (isinstance(loss, torch.Tensor) or is_real(loss)):
            raise ConfigError(f"The loss of a step is a number or a tensor; got {shown(loss)}.")
        mean = loss.detach().float().mean() if isinstance(loss, torch.Tensor) else torch.tensor(loss)
        self.total = self.total + mean.nan_to_num(0.0, 0.0, 0.0)
        self.count = self.count + mean.isfinite()

    def restart(self) -> None:
        """Begin a new interval."""
        self.total, self.count = 0.0, 0

    def mean(self) -> float | None:
        """The mean loss of the interval over all processes, all of which call this; None if no loss was added."""
        sums = self._processes.of_each((float(self.total), int(self.count)))
        count = sum(count for _, count in sums)
        return sum(total for total, _ in sums) / count if count else None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue within an interval, as JSON values; all processes call this."""
        sums = self._processes.of_each((float(self.total), int(self.count)))
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


class GradientWatch:
    """Looks at the gradients of the adapters before optimizer steps."""

    def __init__(self) -> None:
        self._zero_looks = 0

    def look(self, targets: Sequence[TargetModule], step: int, *, closely: bool) -> None:
        """Stop the run if its adapters do not train.

        Args:
            targets: the target modules.
            step: the number of the step, for the error.
            closely: compare the values with zero, for which the device is waited for.

        Raises:
            NoGradientError: no adapter has a gradient, or all gradients have been zero for `PATIENCE` close looks.
        """
        gradients = [target.weight_b.grad for target in targets if target.rank > 0]
        gradients += [target.weight_a.grad for target in targets if target.rank > 0]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            raise NoGradientError(
                f"No adapter received a gradient in step {step}: the loss does not depend on them, so the run would "
                "train nothing. Check that the loss is computed with the adapted model (not with a copy of it, and not "
                "under `torch.no_grad`), and that the adapter is active."
            )
        if not closely:
            return
        self._zero_looks = 0 if bool((norms_of(present) != 0).any()) else self._zero_looks + 1
        if self._zero_looks >= PATIENCE:
            raise NoGradientError(
                f"The gradients of all adapters are zero, in step {step} as in the steps that were looked at before "
                "it: the run trains nothing. Check that the batches hold labels that count (not all of them -100)."
            )
