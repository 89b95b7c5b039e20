"""What a run watches in each step: losses since the last decision, whether adapters train, and all is finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..common.checks import counted, is_real
from ..common.processes import Processes
from ..errors import ConfigError, NoGradientError, NonFiniteError, shown
from ..lora.optimizer_state import unwrap_optimizer
from ..lora.resize import norms_of
from ..lora.targets import TargetModule
from .checkpoint import last_checkpoint
from .journal import Journal
from .run import TrainingRun

if TYPE_CHECKING:
    from .run_control import RunControl

logger = logging.getLogger(__name__)

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


LARGEST = 1e18
"""A gradient above it has a square, which Adam keeps a mean of, that is not finite in float32."""


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor], below: float = math.inf) -> torch.Tensor:
    """Whether all numbers are finite, and their sizes below a bound, as a bool tensor on the device of the first."""
    found = [each for each in tensors if each.is_floating_point() and each.numel()]
    most = torch._foreach_norm(found, math.inf) if found else [torch.zeros(())]
    if len({(each.dtype, each.device) for each in most}) > 1:
        most = [each.float().to(most[0].device) for each in most]
    return (torch.stack(most) < below).all()


def trains_finite(optimizer: torch.optim.Optimizer, *, moments: bool = False) -> bool:
    """Whether all that an optimizer trains is finite, with its state if the `moments` count as well."""
    inner = unwrap_optimizer(optimizer)
    weights: list[torch.Tensor] = [weight for group in inner.param_groups for weight in group["params"]]
    states = (value for weight in weights if moments for value in inner.state.get(weight, {}).values())
    return bool(all_finite([*weights, *(value for value in states if type(value) is torch.Tensor)]))


class FiniteWatch:
    """Notices where a loss or a gradient was not finite, and sees to it that nothing of that is saved.

    On a GPU it does not wait for the device where nothing controls the run; then it may notice some steps later.

    Args:
        run: that it watches.
        journal: is told.

    Attributes:
        control: undoes a step that leaves something which is not finite; None where nothing controls the run.
    """

    def __init__(self, run: TrainingRun, journal: Journal) -> None:
        self._run, self._journal, self._told = run, journal, False
        self.control: RunControl | None = None
        self._restart()

    def _restart(self) -> None:
        self._found = self._host = torch.zeros(2, dtype=torch.bool)  # of losses, and of gradients

    def look(self, loss: torch.Tensor | float) -> None:
        """Look at the mean loss of a step; in a run under control at the gradients as well, up to `LARGEST`."""
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
        """Undo a step that left something which is not finite, end the run, or tell that nothing is broken.

        An overflow in float16, for which a scaler leaves the step out, breaks nothing, nor does a batch without labels.

        Args:
            step: optimizer steps done.

        Raises:
            NonFiniteError: what trains is not finite, and nothing undoes that.
        """
        control = self.control
        processes = self._run.replicas.processes if control else Processes()  # all undo a step; one that ends, ends all
        loss, gradient = processes.most(*map(float, (self._found if control else self._host).tolist()))
        if not loss and not gradient:
            return
        self._restart()
        if processes.least(trains_finite(self._run.optimizer, moments=control is not None))[0]:
            if loss and not self._told:
                self._told = True
                self._journal.note(f"step {step}: the loss was not finite. All that trains is, so the run goes on.")
        elif not (control and control.undo_broken(step)):
            raise self._diverged(step)

    def check(self, step: int) -> None:
        """See that what trains is finite, before it is saved or handed back; all processes call this.

        Raises:
            NonFiniteError: it is not.
        """
        if not self._run.replicas.processes.least(trains_finite(self._run.optimizer))[0]:
            raise self._diverged(step)

    def _diverged(self, step: int) -> NonFiniteError:
        """The error of a run that has diverged, of which the log gets a row."""
        self._journal.log_control({"step": step, "change": 0.0, "undone": False, "not_finite": True})
        last = last_checkpoint(self._run.folder, tell=logger.debug) if self._run.folder else None
        saved = f"The last checkpoint is {last}." if last else "No checkpoint is replaced."
        helps = "" if self.control else " With control=True a run undoes such a step."
        return NonFiniteError(
            f"After step {step} what trains holds NaN or infinity: the run has diverged, and nothing of that is saved. "
            f"{saved} Lower the learning rate, clip gradients, or look at the data.{helps}"
        )


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
