"""Checks of a run in each step: the calls of its loop, losses, gradients of adapters, and finite values."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..common.checks import counted, is_real
from ..common.errors import ConfigError, NoGradientError, NonFiniteError, shown
from ..common.processes import Processes
from ..cost.record.peak_meter import PeakMeter
from ..lora.optimizer_state import unwrap_optimizer
from ..lora.resize import norms_of
from ..lora.targets import TargetModule
from .checkpoint import last_checkpoint
from .controlled_rate import ControlledRate
from .race import RateRace
from .step.journal import Journal
from .step.run import Participant, TrainingRun

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Number of checks in a row with all-zero gradients that stop the run. One batch may have none: all of its labels may
be masked."""


class LossMeter(Participant):
    """Sums the losses of optimizer steps, without waiting for the device.

    Args:
        processes: the processes whose losses count; by default only this one.

    Attributes:
        total: the sum of the finite losses in this process, a float or a scalar tensor.
        count: their number.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count: torch.Tensor | int = 0
        self._processes = processes or Processes()

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Add the mean loss of this step; a NaN loss, as with fully masked labels, is skipped."""
        if not (isinstance(loss, torch.Tensor) or is_real(loss)):
            raise ConfigError(f"The loss of a step must be a number or a tensor; got {shown(loss)}.")
        mean = loss.detach().float().mean() if isinstance(loss, torch.Tensor) else torch.tensor(loss)
        self.total = self.total + mean.nan_to_num(0.0, 0.0, 0.0)
        self.count = self.count + mean.isfinite()

    def restart(self) -> None:
        """Start a new interval."""
        self.total, self.count = 0.0, 0

    def mean(self) -> float | None:
        """Return the mean loss of the interval over all processes, which must all call this; None without losses."""
        sums = self._processes.of_each((float(self.total), int(self.count)))
        count = sum(count for _, count in sums)
        return sum(total for total, _ in sums) / count if count else None

    def state(self) -> dict[str, Any]:
        """Return the sums of the interval, as JSON values; all processes call this."""
        sums = self._processes.of_each((float(self.total), int(self.count)))
        whole = {"total": sum(total for total, _ in sums), "count": sum(count for _, count in sums)}
        return {"losses": whole | ({"of_each": sums} if len(sums) > 1 else {})}

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Resume within an interval. If the number of processes has changed, the first takes all."""
        if state is None:
            return
        losses = state["losses"]
        whole = [(losses["total"], losses["count"])]
        sums = losses.get("of_each", whole)
        if len(sums) != self._processes.count:
            sums = whole + [(0.0, 0)] * (self._processes.count - 1)
        total, count = sums[self._processes.rank]
        self.total, self.count = float(total), counted(count)


LARGEST = 1e18
"""Bound on gradients: above it, the squares averaged by Adam may overflow in float32."""


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor], below: float = math.inf) -> torch.Tensor:
    """Check that all numbers are finite and smaller in size than a bound; return a bool tensor on the first device."""
    found = [each for each in tensors if each.is_floating_point() and each.numel()]
    most = torch._foreach_norm(found, math.inf) if found else [torch.zeros(())]
    if len({(each.dtype, each.device) for each in most}) > 1:
        most = [each.float().to(most[0].device) for each in most]
    return (torch.stack(most) < below).all()


def trains_finite(optimizer: torch.optim.Optimizer, *, moments: bool = False) -> bool:
    """Check that all trained tensors of an optimizer are finite, including its state if `moments` is True."""
    inner = unwrap_optimizer(optimizer)
    weights: list[torch.Tensor] = [weight for group in inner.param_groups for weight in group["params"]]
    states = (value for weight in weights if moments for value in inner.state.get(weight, {}).values())
    return bool(all_finite([*weights, *(value for value in states if type(value) is torch.Tensor)]))


class FiniteWatch(Participant):
    """Detects non-finite losses and gradients, and prevents saving their results.

    On a GPU without control of the run it does not wait for the device, and may detect them some steps later.

    Args:
        run: the run to watch.
        journal: gets the reports.

    Attributes:
        control: undoes a step with a non-finite result; None without control of the run.
    """

    def __init__(self, run: TrainingRun, journal: Journal) -> None:
        self._run, self._journal, self._told = run, journal, False
        self.control: ControlledRate | RateRace | None = None
        self._restart()

    def _restart(self) -> None:
        self._found = self._host = torch.zeros(2, dtype=torch.bool)  # of losses, and of gradients

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Check the mean loss of a step; in a run under control also the gradients, up to `LARGEST`."""
        mean = loss.detach().float().mean() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss))
        weights = [weight for group in self._run.optimizer.param_groups if self.control for weight in group["params"]]
        sound = all_finite((weight.grad for weight in weights if weight.grad is not None), LARGEST)
        device = sound.device if sound.is_cuda else mean.device
        self._found = self._found.to(device) | ~torch.stack([mean.isfinite().to(device), sound.to(device)])
        if device.type == "cuda":
            self._host = self._host if self._host.is_pinned() else self._host.pin_memory()
            self._host.copy_(self._found, non_blocking=True)
        else:
            self._host = self._found

    def after_step(self, step: int) -> None:
        """Undo a step with a non-finite result, end the run, or report that nothing is broken.

        An overflow in float16, skipped by a scaler, breaks nothing, nor does a batch without labels.

        Args:
            step: the number of optimizer steps done.

        Raises:
            NonFiniteError: a trained tensor is not finite, and nothing undoes that.
        """
        control = self.control
        processes = self._run.replicas.processes if control else Processes()  # all undo a step; if one ends, all end
        loss, gradient = processes.most(*map(float, (self._found if control else self._host).tolist()))
        if not loss and not gradient:
            return
        self._restart()
        if processes.least(trains_finite(self._run.optimizer, moments=control is not None))[0]:
            if loss and not self._told:
                self._told = True
                self._journal.note(f"step {step}: the loss was not finite, but all trained parameters are; continuing.")
        elif not (control and control.undo_broken(step)):
            raise self._diverged(step)

    def check(self, step: int) -> None:
        """Check that trained tensors are finite, before they are saved or returned; all processes call this.

        Raises:
            NonFiniteError: they are not.
        """
        if not self._run.replicas.processes.least(trains_finite(self._run.optimizer))[0]:
            raise self._diverged(step)

    def _diverged(self, step: int) -> NonFiniteError:
        """Log a row and return the error of a run that has diverged."""
        self._journal.log_control({"step": step, "change": 0.0, "undone": False, "not_finite": True})
        last = last_checkpoint(self._run.folder, tell=logger.debug) if self._run.folder else None
        saved = f"The last checkpoint is {last}." if last else "No checkpoint is overwritten."
        helps = "" if self.control else " control=True undoes such steps."
        return NonFiniteError(
            f"After step {step} trained parameters contain NaN or infinity: the run has diverged, and they "
            f"are not saved. {saved} Lower the learning rate, clip gradients, or check the data.{helps}"
        )


class GradientWatch(Participant):
    """Checks the gradients of the adapters before optimizer steps.

    Args:
        targets: the target modules.
        meter: measures some steps. In those the gradients are compared with zero, which waits for the device.
        may_be_zero: True if gradients of zero are no error, as under GRPO while all answers have the same reward.
    """

    def __init__(self, targets: Sequence[TargetModule], meter: PeakMeter, *, may_be_zero: bool = False) -> None:
        self._targets, self._meter, self._may_be_zero = targets, meter, may_be_zero
        self._zero_looks = 0

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Stop the run if its adapters do not train.

        Raises:
            NoGradientError: no adapter has a gradient, or all gradients were zero in the last `PATIENCE` measured
                steps.
        """
        targets = [target for target in self._targets if target.rank > 0]
        gradients = [weight.grad for target in targets for weight in (target.weight_b, target.weight_a)]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            raise self._refusal(
                f"No adapter received a gradient in step {step + 1}: the loss does not depend on them, so the run "
                "would train nothing. Check that the loss is computed with the adapted model (not a copy, and "
                "not under `torch.no_grad`), and that the adapter is active."
            )
        if not self._meter.measuring or self._may_be_zero:
            return
        self._zero_looks = 0 if bool((norms_of(present) != 0).any()) else self._zero_looks + 1
        if self._zero_looks >= PATIENCE:
            raise self._refusal(
                f"The gradients of all adapters are zero in step {step + 1}, as in the steps checked before it: "
                "the run trains nothing. Check that the batches have labels that count (not all of them -100)."
            )

    def _refusal(self, text: str) -> NoGradientError:
        """End measuring and return the error of a run that trains nothing."""
        self._meter.close()
        return NoGradientError(text)
