"""Records the decisions of a run: a list of costs, a line for people, and the decision log.

Changes of rank outside the policy, such as a shrinking plan, are recorded like decisions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from ...agents.policy_file import CARD, WEIGHTS
from ...common.arrays import IntArray
from ...common.errors import BudgetError
from ...common.files import append_json_line, read_json_lines, write_json_lines
from ...common.text import part_of
from ...cost.cost import plan_cost
from ...cost.savers.checkpointed_layers import could_checkpoint
from ...cost.savers.prices import ACTIVATIONS, Saved, plain_text
from ...decide.applier import PlanApplier
from ...decide.choice import Choice
from ...decide.log import CONTROL, POLICY, DecisionLog, DecisionRecord
from ...decide.observation import Observation
from ...decide.plan.plan import Plan
from ...decide.plan.problem import AllocationProblem
from ...decide.policy import Decision, Policy, decision_from_plan
from ...lora.spec import REFERENCE_RANK


@dataclass(frozen=True, eq=False)
class PlanChange:
    """An applied decision of the policy, or a change of ranks outside the policy.

    Attributes:
        step: the optimizer steps before it.
        observation: the state of the run before it.
        decision: the wanted ranks.
        plan: the new plan.
        corrects: True if the guard or the user changed the ranks, not the policy.
        reason: why, for the decision log; empty for a decision, and for ranks set by hand.
    """

    step: int
    observation: Observation
    decision: Decision
    plan: Plan
    corrects: bool = False
    reason: str = ""

    @classmethod
    def correction(cls, step: int, reason: str, wanted: IntArray, observation: Observation, plan: Plan) -> PlanChange:
        """Create a change by the guard; `wanted` are the previous or the current ranks, int64 (modules,)."""
        return cls(step, observation, decision_from_plan(wanted), plan, corrects=True, reason=reason)

    @property
    def notes(self) -> dict[str, str]:
        """The reason, for each module with a new rank."""
        moved = np.flatnonzero(self.plan.ranks != self.observation.problem.ranks)
        return {self.observation.names[module]: self.reason for module in moved.tolist()} if self.reason else {}


RECOMPUTE = ", as does gradient checkpointing, which takes time"
"""Possible remedy other than a larger budget."""


class Journal:
    """Records the decisions and corrections of one run.

    Args:
        log: the decision log; None for none.
        policy: decides.
        tell: called with a line for each decision and correction.

    Attributes:
        log: as above; it may be set later.
        predictions: (step, predicted cost of the plan) of each decision and correction.
    """

    log: DecisionLog | None
    tell: Callable[[str], None]

    def __init__(self, log: DecisionLog | None, policy: Policy, tell: Callable[[str], None]) -> None:
        self.log, self.tell = log, tell
        self.predictions: list[tuple[int, float]] = []
        self._policy = policy
        self._name, self._writes, self._saved = "", True, tuple[Saved, ...]()

    def open(self, name: str, predictions: list[tuple[int, float]], *, writes: bool = True) -> None:
        """Start recording a run, after its earlier decisions.

        Args:
            name: the name of the run.
            predictions: predictions of those decisions. Without any, a run begins, and the log of an earlier one is
                moved away.
            writes: True if this process writes and reports; only one of several processes does.
        """
        self._name, self.predictions, self._writes, self._saved = name, predictions, writes, ()
        if self.log is not None and writes:
            self.log.make_folder()
            if not predictions and (aside := self.log.put_aside()):
                self.tell(f"{self.log.folder} contained the decision log of an earlier run, now in {aside}.")
            self.log.truncate(len(predictions))
            if folder := getattr(self._policy, "folder", None):  # of a trained one, for the study of the run
                (self.log.folder / POLICY).mkdir(exist_ok=True)
                for name in (CARD, WEIGHTS):
                    shutil.copyfile(folder / name, self.log.folder / POLICY / name)

    def resumed(self, step: int, applier: PlanApplier[Any]) -> None:
        """Report that a run resumes after a step, and its plan."""
        (at, cost), ranks = self.predictions[-1], applier.ranks
        adapted, taken = np.count_nonzero(ranks), part_of(cost, applier.limit, applier.cost.unit)
        plan = f"{adapted} of {len(ranks)} modules adapted, {taken}, mean rank {ranks.mean():.1f}"
        self.note(f"Resuming after step {step} with the plan of step {at}: {plan}.")

    def forget(self, keep: int) -> None:
        """Keep only the first `keep` decisions and corrections, since the later ones were undone."""
        if len(self.predictions) > keep:
            del self.predictions[keep:]
            if self.log is not None and self._writes:
                self.log.truncate(keep)
            self.note("The previous plan is restored, with all adapters and the optimizer.")

    def log_control(self, row: Mapping[str, Any]) -> None:
        """Log the control of the learning rate at a step, or the non-finite values left by the step."""
        if self.log is not None and self._writes:
            append_json_line(self.log.folder / CONTROL, row)

    def forget_control(self, step: int) -> None:
        """Delete control rows logged after a checkpoint of this step, when resuming from it."""
        if self.log is not None and self._writes and (path := self.log.folder / CONTROL).is_file():
            rows = [row for row in read_json_lines(path) if row["step"] < step + bool(row.get("not_finite"))]
            write_json_lines(path, rows)

    def note(self, line: str) -> None:
        """Report a line, if not empty."""
        if self._writes and line:
            self.tell(line)

    def note_saved(self, saved: Sequence[Saved]) -> None:
        """Report the memory of plain LoRA without and with exact savers; record it with the first decision."""
        self._saved = tuple(saved)
        if saved:
            selective = " Selective checkpointing is on, at some cost in time."
            self.note(plain_text(saved) + (selective if saved[-1].name == ACTIVATIONS else ""))

    def record(
        self,
        applier: PlanApplier[Any],
        change: PlanChange,
        *,
        loss: float | None,
        peak: int | None,
        rates: tuple[float, float] | None = None,
        remark: str = "",
    ) -> None:
        """Record a change just applied, with the cost of its plan until the next one.

        Args:
            applier: has applied it.
            change: the decision or correction.
            loss: mean training loss since the previous change.
            peak: the latest measured peak in bytes.
            rates: peak learning rates for plain LoRA, and under the plan.
            remark: appended to the line.

        Raises:
            BudgetError: the plan holds no adapter.
        """
        step, observation = change.step, change.observation
        plan = replace(change.plan, cost=plan_cost(applier.cost_now(), change.plan.ranks))
        self.predictions.append((step, plan.cost))
        record = DecisionRecord.of(
            applier,
            observation,
            change.decision,
            plan,
            policy=self._policy,
            number=len(self.predictions) - 1,
            step=step,
            run=self._name,
            loss=loss,
            measured_cost=float(peak) if peak and observation.problem.cost.unit == "bytes" else None,
            notes=change.notes,
            correction=change.corrects,
            saved=self._saved if len(self.predictions) == 1 else (),
            rates=rates,
        )
        if self.log is not None and self._writes:
            self.log.append(record)
        self.note(record.line() + (f", {remark}" if remark else ""))
        if record.number == 0 and change.decision.choice is not None:
            self._note_expected(change.decision.choice, observation.problem, applier.adapters.model)
        if not plan.ranks.any():
            raise BudgetError(
                f"No adapter is left at step {step}: those that fit the budget contain NaN or infinity and keep "
                "their ranks. Lower the learning rate, or raise the budget."
            )

    def _note_expected(self, found: Choice, problem: AllocationProblem, model: nn.Module) -> None:
        """Report the expected loss of the first plan, and remedies if it is high."""
        more = problem.cost.unit == "bytes" and could_checkpoint(model)
        helps = f"A larger budget would help{RECOMPUTE if more else ''}."
        if problem.fits(np.full_like(problem.ranks, REFERENCE_RANK)):
            helps = "The budget has room for it, but the bounds do not."
        if expected := found.promise():
            self.note(f"{expected} {helps}" if found.lacks_room else expected)
        if found.caveats:
            self.note(f"Expectations come from other runs and are less reliable here: {', '.join(found.caveats)}.")
