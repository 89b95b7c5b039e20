"""Control of a run: its learning rate is corrected, and damage undone; see `decide/rate_control.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..common.checks import counted, finite
from ..cost.batch_shape import Batch
from ..decide.rate_control import CHANGES, FEATURES, HALVED, PATIENCE, UNDO, RateControl, RunRecord
from ..lora.optimizer_state import last_direction
from ..lora.targets import TargetModule
from .plan_rate import PlanRate
from .step.journal import Journal
from .step.put_back import AdapterSnapshot
from .step.run import Participant, TrainingRun


@torch.no_grad()
def alignment(optimizer: torch.optim.Optimizer, targets: Sequence[TargetModule]) -> torch.Tensor:
    """Return the cosine of the optimizer's last step of the adapters with their descent direction; NaN before a step.

    Args:
        optimizer: an Adam variant.
        targets: modules whose adapters hold gradients.
    """
    products: list[torch.Tensor] = []
    for parameter in (p for target in targets for p in target.parameters.values()):
        direction = None if parameter.grad is None else last_direction(optimizer, parameter)
        if direction is not None and parameter.grad is not None:
            step, gradient = direction.flatten(), parameter.grad.float().flatten()
            products += [step @ gradient, step @ step, gradient @ gradient]
    if not products:
        return torch.tensor(math.nan)
    dot, steps, gradients = torch.stack(products).double().view(-1, 3).sum(dim=0)
    cosine: torch.Tensor = dot / (steps * gradients).sqrt()
    return cosine


class ControlledRate(Participant):
    """Reads the steps of a run and corrects its learning rate at a few moments.

    Copies for undoing are kept in main memory. A change of ranks invalidates them: another is made before the next
    step. A step that leaves non-finite weights or moments is undone at once, even after the last moment: from then on,
    and in runs too short for control, a copy is made at each tenth of the run.

    Args:
        run: the run about to begin.
        targets: its adapters.
        rate: multiplies the learning rate.
        control: chooses; None if the policy of the ranks does, see `steer`.
        steps: steps before which the rate is decided.
        journal: notified of each change.

    Attributes:
        record: observations of the run so far.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        rate: PlanRate,
        control: RateControl | None,
        steps: Sequence[int],
        journal: Journal,
    ) -> None:
        self._run, self._targets, self._rate, self._control, self._journal = run, targets, rate, control, journal
        self._steps = tuple(steps)
        self._seen: list[tuple[torch.Tensor | float, torch.Tensor]] = []
        last = self._steps[-1] if self._steps else 0
        self._copies = {at for tenth in range(1, 10) if (at := round(tenth * run.total_steps / 10)) > last}
        self._kept: AdapterSnapshot | None = None
        self._kept_at = 0
        self._broken = (-1, 0)  # last step with a non-finite result, and their number in a row
        self.record: RunRecord = RunRecord(run.total_steps)

    def _keep(self, step: int) -> AdapterSnapshot:
        kept = self._kept = AdapterSnapshot(self._run.model, self._targets, self._run.optimizer, steps=True)
        self._kept_at = step
        return kept

    def ranks_changed(self) -> None:
        """Drop a copy with other ranks."""
        if self._kept and not self._kept.fits:
            self._kept = None

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Read the loss and the alignment of a step, up to the last decision on the rate."""
        if self._steps and step < self._steps[-1]:
            mean = loss.detach().float().mean() if isinstance(loss, torch.Tensor) else loss
            self._seen.append((mean, alignment(self._run.optimizer, self._targets)))

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Decide the rate if due at `step`, the optimizer steps done; make a copy if due."""
        if self._control and step in self._steps and (self._seen or self.record.losses):
            self._decide(step, self._control)
        if self._control and self._steps and step == self._steps[-1] and not self.record.changed:
            self._journal.note(f"step {step}: the learning rate is kept; no moment gave clear evidence for a change.")
        if self._kept is None or step in self._copies:
            self._keep(step)

    def undo_broken(self, step: int) -> bool:
        """Restore the copy at once, and halve the rate, after a step with a non-finite result.

        Args:
            step: optimizer steps done, including that one.

        Returns:
            False if this is useless: without a copy, or after it failed for `PATIENCE` steps in a row.
        """
        last, before = self._broken
        self._broken = step, before + 1 if step == last + 1 else 1
        if self._kept is None:
            return False
        at, self._seen = self._kept_at, []
        self.record.losses, self.record.alignments = [], []
        said = f"It made weights or optimizer moments non-finite. Adapters and optimizer are restored to step {at}."
        # By half: the cause may be one batch, not the rate.
        self._take(HALVED, step, said, {"not_finite": True}, back=True)
        return self._broken[1] < PATIENCE

    def _read(self) -> None:
        for loss, aligned in self._seen:
            if math.isfinite(loss):  # else the step has changed nothing, like one skipped by a scaler
                self.record.add(float(loss), float(aligned))
        self._seen = []

    def read(self, step: int) -> float:
        """Record all steps before `step`; return the schedule's current rate, as a share of its peak."""
        self._read()
        self.record.step = step
        peak = self._rate.own
        now = max((group["lr"] for group in self._run.optimizer.param_groups), default=peak)
        return min(float(now) / peak, 1.0) if peak else 1.0

    def steer(self, change: int, step: int) -> None:
        """Apply the policy's decision to the rate, an index of `CHANGES`."""
        if self.record.losses:
            back = change == UNDO and self._kept is not None
            self._take(
                change, step, "Adapters and optimizer are restored from their copy." if back else "", {}, back=back
            )

    def _decide(self, step: int, control: RateControl) -> None:
        seen = self.record.observe(self.read(step))
        action = self._run.replicas.processes.on_first(lambda: int(control.act(seen[None])[0]))
        named = dict(zip(FEATURES, seen.round(4).tolist(), strict=True))
        aligned, loss = named["alignment"] / 4, math.exp(named["loss"] / 2)
        said = f"Alignment of recent steps {aligned:+.2f}, loss {loss:.2f} of its initial value."
        if back := action == UNDO and self._kept is not None:
            said += " Adapters and optimizer are restored to when the rate was last kept or raised."
        self._take(action, step, said, {"seen": named}, back=back)

    def _take(self, action: int, step: int, said: str, row: Mapping[str, Any], *, back: bool) -> None:
        """Apply an action, restore the copy if part of it, report it with some words, and log it with a row."""
        if back and self._kept:
            self._kept.put_back()
        if back or CHANGES[action] >= 0:
            self._keep(self._kept_at if back else step)
        self.record.take(action, undone=back)
        before = self._rate.rate
        self._rate.move(2**self.record.moved)
        rate = self._rate.rate
        if CHANGES[action]:
            self._journal.note(f"step {step}: learning rate changed from {before:.2g} to {rate:.2g}. {said}".rstrip())
        self._journal.log_control({"step": step, "change": CHANGES[action], "undone": back, "rate": rate, **row})

    def state(self) -> dict[str, Any]:
        """Return the state for `begin`, as tensors and JSON values, including the copy."""
        self._read()
        kept = self._kept.state_dict() if self._kept else None
        at, broken = self._kept_at if self._kept else None, list(self._broken)
        return {"control": {**asdict(self.record), "kept": kept, "kept_at": at, "broken": broken}}

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Restore a state of control, if any; without a copy in it, the next step makes one."""
        state = state and state.get("control")
        if not state:
            return
        if state.get("kept"):
            self._keep(counted(state["kept_at"])).load_state_dict(state["kept"])
        elif state.get("kept_at") is not None:
            self._journal.note("The checkpoint has no copy to undo to, so an undo returns to this step.")
        last, row = state.get("broken", self._broken)
        self._broken = int(last), counted(row)
        lists = ("losses", "alignments", "_first", "_first_alignments", "_means")
        further: dict[str, Any] = {name: [finite(value) for value in state[name]] for name in lists}
        further |= {name: finite(state[name]) for name in ("moved", "_schedule", "_now")}
        self.record = RunRecord(
            self._run.total_steps,
            changed=bool(state["changed"]),
            step=counted(state["step"]),
            _undone=bool(state["_undone"]),
            **further,
        )
        self._rate.move(2**self.record.moved)
