"""Control of a run while it goes: its learning rate is corrected, and damage undone; see `agents/control.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..agents.control import CHANGES, FEATURES, UNDO, Controller, RunRecord, decision_steps
from ..agents.log import CONTROL
from ..common.checks import counted, finite
from ..common.files import append_json_line, read_json_lines, write_json_lines
from ..errors import ConfigError
from ..lora.optimizer_state import last_direction, unwrap_optimizer
from ..lora.targets import TargetModule
from .journal import Journal
from .left_as_found import Kept
from .plan_rate import PlanRate, follows_rule
from .run import TrainingRun


@torch.no_grad()
def alignment(optimizer: torch.optim.Optimizer, targets: Sequence[TargetModule]) -> torch.Tensor:
    """The cosine between the optimizer's last step of the adapters and their descent direction now; NaN before a step.

    Args:
        optimizer: one of Adam's kin.
        targets: whose adapters hold gradients.
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


class RunControl:
    """Reads the steps of a run and corrects its learning rate at a few moments.

    Copies for undoing lie in main memory. A change of ranks makes them useless: another is made before the next step.

    Args:
        run: that begins.
        targets: its adapters.
        rate: what multiplies the learning rate.
        controller: chooses.
        journal: told of each change.

    Attributes:
        record: what the run has shown.

    Raises:
        ConfigError: the optimizer is no kind of Adam.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        rate: PlanRate,
        controller: Controller,
        journal: Journal,
    ) -> None:
        if not follows_rule(run.optimizer):
            raise ConfigError(
                "control=True reads the steps of Adam and its variants; "
                f"{type(unwrap_optimizer(run.optimizer)).__name__} is none, or chooses its "
                "rate itself. Leave control out."
            )
        self._run, self._targets, self._rate, self._controller, self._journal = run, targets, rate, controller, journal
        self._steps = decision_steps(run.total_steps)
        self._seen: list[tuple[torch.Tensor | float, torch.Tensor]] = []
        self._kept: Kept | None = None
        self._beside = math.log2(rate.plain / rate.rule) if rate.rule and rate.plain else None
        self.record: RunRecord = RunRecord(run.total_steps, self._beside)
        if not self._steps:
            journal.note(f"The learning rate is not controlled: a run of {run.total_steps} steps shows too little.")

    def _keep(self) -> None:
        self._kept = Kept(self._run.model, self._targets, self._run.optimizer, steps=True)

    def ranks_changed(self) -> None:
        """A copy of other ranks is of no use."""
        self._kept = None

    def look(self, loss: torch.Tensor | float, step: int) -> None:
        """Read the gradients of a step, which are complete.

        Args:
            loss: the mean loss of the step.
            step: optimizer steps done before it.
        """
        if self._steps and step < self._steps[-1]:
            mean = loss.detach().float().mean() if isinstance(loss, torch.Tensor) else loss
            self._seen.append((mean, alignment(self._run.optimizer, self._targets)))

    def before_step(self, step: int) -> None:
        """Act if it is the moment.

        Args:
            step: optimizer steps done.
        """
        if not self._steps or step > self._steps[-1]:
            return
        if step in self._steps and (self._seen or self.record.losses):
            self._decide(step)
        if step == self._steps[-1] and not self.record.changed:
            self._journal.note(f"step {step}: the learning rate stays as it is: no moment was sure of a change.")
        if step >= self._steps[-1]:
            self._kept = None
        elif self._kept is None:
            self._keep()

    def _read(self) -> None:
        for loss, aligned in self._seen:
            self.record.add(float(loss), float(aligned))
        self._seen = []

    def _decide(self, step: int) -> None:
        self._read()
        self.record.step = step
        peak = self._rate.own
        now = max((group["lr"] for group in self._run.optimizer.param_groups), default=peak)
        seen = self.record.observe(min(float(now) / peak, 1.0) if peak else 1.0)
        action = self._run.replicas.processes.on_first(lambda: int(self._controller.act(seen[None])[0]))
        self._take(action, step, dict(zip(FEATURES, seen.round(4).tolist(), strict=True)))

    def _take(self, action: int, step: int, seen: Mapping[str, float]) -> None:
        undone = action == UNDO and self._kept is not None
        if undone and self._kept:
            self._kept.put_back()
        if undone or CHANGES[action] >= 0:
            self._keep()
        self.record.take(action)
        before, self._rate.moved = self._rate.rate, 2**self.record.moved
        self._rate.follow()
        if CHANGES[action]:
            self._journal.note(
                f"step {step}: the learning rate goes from {before:.2g} to {self._rate.rate:.2g}. Alignment of the "
                f"last steps {seen['alignment'] / 4:+.2f}, loss {math.exp(seen['loss'] / 2):.2f} of the first."
                + (" Adapters and optimizer are back where the rate was last kept or raised." if undone else "")
            )
        log = self._journal.log
        if log is not None and self._run.replicas.processes.first:
            row = {"step": step, "change": CHANGES[action], "undone": undone, "rate": self._rate.rate}
            append_json_line(log.folder / CONTROL, {**row, "seen": dict(seen)})

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON values."""
        self._read()
        return asdict(self.record)

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from `state_dict`, so many optimizer steps done; the copy for undoing is one of now."""
        log = self._journal.log
        if log is not None and self._run.replicas.processes.first and (path := log.folder / CONTROL).is_file():
            write_json_lines(path, [row for row in read_json_lines(path) if row["step"] < step])
        self.record = RunRecord(
            self._run.total_steps,
            self._beside,
            losses=[finite(value) for value in state["losses"]],
            alignments=[finite(value) for value in state["alignments"]],
            moved=finite(state["moved"]),
            changed=bool(state["changed"]),
            step=counted(state["step"]),
            _first=[finite(value) for value in state["_first"]],
            _means=[finite(value) for value in state["_means"]],
            _undone=bool(state["_undone"]),
            _schedule=finite(state["_schedule"]),
        )
        self._rate.moved = 2**self.record.moved
