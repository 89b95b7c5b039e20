"""Learning rate of the plan: adapters train at their optimizer's rate times a factor.

The factor is applied only around each optimizer step, so schedules, warm-up, several groups, and loops that set the
rate themselves work unchanged. Between steps the groups show the user's rate. The rule and control ignore a rate
written there by a user's Trainer callback in addition to its schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.errors import ConfigError
from ..data.batches import predicted_share
from ..decide.plan.rate import LEAST_LOSS, RULE, TYPICAL, InitialLoss, RateRange
from ..decide.plan.worth import KNOWN
from ..lora.optimizer_state import unwrap_optimizer
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule, unwrap
from .step.run import FIRST_ROWS, FirstRows, Participant, TrainingRun, adapter_rates, group_rates, own_rate, probe_rate

FAR = 4.0
"""Ratio to the rule's rate, up or down, above which the rate is reported."""

PEAK = 0.99
"""Share of its peak below which the first step's rate belongs to a warm-up."""

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
"""Names of the hidden width in model configurations."""

_OWN_RATE = ("prodigy", "dadapt", "schedulefree", "adafactor")
"""Substrings of the names of optimizers that choose their own rate, or are not Adam variants."""


def hidden_width(model: nn.Module) -> int | None:
    """Return the width of a model's hidden states, from its configuration; None if not given there."""
    config = getattr(unwrap(model), "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        for name in _WIDTHS:
            width = getattr(holder, name, None)
            if type(width) is int and width > 0:
                return width
    return None


def chooses_own_rate(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer sets its rate itself."""
    return any(part in type(unwrap_optimizer(optimizer)).__name__.lower() for part in _OWN_RATE)


def follows_rule(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer is an Adam variant with a rate chosen by the user."""
    return "adam" in type(unwrap_optimizer(optimizer)).__name__.lower() and not chooses_own_rate(optimizer)


def check_follows(optimizer: torch.optim.Optimizer, asked: str, instead: str) -> None:
    """Reject rate control for an optimizer that is no Adam variant: the alignment of its steps is unknown.

    Args:
        optimizer: the optimizer of the run.
        asked: the user's request, for the error.
        instead: advice for the error.

    Raises:
        ConfigError: it is no Adam variant, or chooses its own rate.
    """
    if not follows_rule(optimizer):
        raise ConfigError(
            f"{asked} corrects the learning rate from the steps of Adam or a variant; "
            f"{type(unwrap_optimizer(optimizer)).__name__} is not one, or sets its own rate. {instead}"
        )


def rule_knows(run: TrainingRun) -> bool:
    """True if the rule covers a run's optimizer, model and loss."""
    return follows_rule(run.optimizer) and hidden_width(run.model) is not None and not run.learns_preferences


def rate_by_rule(
    model: nn.Module, targets: Sequence[TargetModule], steps: int, initial: InitialLoss = TYPICAL
) -> float:
    """Return the rule's rate for plain LoRA on a model.

    Args:
        model: a PEFT model.
        targets: its adapters, whose alpha sets the scale at rank 8.
        steps: the length of the run in optimizer steps.
        initial: the loss before training, and the tokens of a step.

    Raises:
        ConfigError: the model's configuration has no width.
    """
    width = hidden_width(model)
    if width is None:
        raise ConfigError(
            "learning_rate='auto' needs the model's width, but the configuration of "
            f"{type(unwrap(model)).__name__} has none of {', '.join(_WIDTHS)}. Pass a rate, such as 2e-4."
        )
    return RULE.plain(width, steps, _scale(targets), initial)


def initial_loss(run: TrainingRun, first_rows: FirstRows) -> InitialLoss:
    """Return the rule's inputs from some rows before training; runs on labels all get the same.

    Args:
        run: the run about to begin.
        first_rows: the result of `TrainingRun.read_first_rows`.
    """
    loss, counts = first_rows
    if predicted_share(counts) < LABELS or not math.isfinite(loss):
        return TYPICAL
    rows = run.rows * run.accumulation * run.replicas.processes.count
    return InitialLoss(loss, sum(predictions for predictions, _ in counts) / FIRST_ROWS * rows)


LABELS = 0.05
"""Share of counted tokens below which a loss is one on labels."""


def learns_labels(run: TrainingRun, initial: InitialLoss | None) -> bool:
    """True if a run learns labels: its model has no output layer over tokens, or its loss counts hardly any of them.

    Args:
        run: the run about to begin.
        initial: the result of `initial_loss`; None if no row was read.
    """
    output = getattr(unwrap(run.model), "get_output_embeddings", None)
    return initial == TYPICAL or (output is not None and output() is None)


def _groups_at_zero(run: TrainingRun) -> list[int]:
    """Return the indices of optimizer groups whose adapters have a rate of 0 while others do not.

    Raises:
        ConfigError: the rate of a group with adapters is negative or not finite.
    """
    rates = adapter_rates(run.model, run.optimizer)
    for group, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise ConfigError(
                f"The optimizer's learning rate is {rate} in group {group}, so nothing would train. Create the "
                "optimizer with a rate above 0, or set TrainingArguments.learning_rate."
            )
    return [group for group, rate in rates.items() if not rate and any(rates.values())]


def _check_auto(run: TrainingRun) -> None:
    """Reject learning_rate="auto" where the rule does not apply; see `PlanRate`."""
    optimizer = unwrap_optimizer(run.optimizer)
    if not follows_rule(optimizer):
        raise ConfigError(
            f"learning_rate='auto' is for Adam and its variants; {type(optimizer).__name__} is not one, or "
            "sets its own rate. Leave learning_rate out, and set the optimizer's rate."
        )
    if run.learns_preferences:
        raise ConfigError(
            "learning_rate='auto' is for losses on labels, and the batches of this run have none: preference "
            "losses need far lower rates. Leave learning_rate out, and set the optimizer's rate (about 5e-6 "
            "for DPO)."
        )
    if not own_rate(run.model, run.optimizer):
        raise ConfigError(
            "learning_rate='auto' scales the optimizer's rate, which is 0. Create the optimizer with any "
            "rate above 0 (TrainingArguments.learning_rate)."
        )


def _scale(targets: Sequence[TargetModule]) -> float:
    """Return the scale of plain LoRA, the geometric mean over the modules."""
    return float(np.exp(np.mean([math.log(target.scaling_at(REFERENCE_RANK)) for target in targets])))


class PlanRate(Participant):
    """Multiplies the learning rate of adapters by the factor of the plan, and of the rule if requested.

    Args:
        run: the run.
        targets: its adapters. Optimizer groups without adapters follow if they have the same rate.
        auto: start from the rule's rate for plain LoRA, instead of the optimizer's own.
        controlled: True if the run's steps correct the rate, which then starts lower, except for runs on labels.
        keep: leave the rate unchanged, whatever the plan.
        raced: True if several rates race, which are told elsewhere.
        initial: the loss before training, and the tokens of a step.
        own: the attribute `own` of a resumed run, whose optimizer may be anywhere on its schedule.

    Attributes:
        initial: the loss before training; None if no row was read.
        own: the optimizer's initial or warmed-up rate.
        of_labels: True if the run learns labels.
        rule: the rule's rate for plain LoRA; None if the optimizer is no Adam variant, or the width is unknown.
        factor: current factor on the rate.
        moved: its part due to control of the run.
        last: the rate of the optimizer's first group in its last step; None before one.
        share: the schedule's rate in that step, as a share of its peak.
        lead_in: steps of a warm-up for a schedule without one; 0 for none.
        watched: True during a race; `share` and `past` are then known.
        repeats: True while a lane repeats an earlier step, at the schedule's rate of that step.
        step: optimizer steps done, in a race; fewer while a step is repeated.
        past: rates of the groups by step, before the factor.

    Raises:
        ConfigError: the optimizer's rate is negative or not finite; or `auto` is set and the rule does not apply: to
            another optimizer, or to losses that compare answers.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        *,
        auto: bool,
        controlled: bool = False,
        keep: bool,
        raced: bool = False,
        initial: InitialLoss | None = None,
        own: float | None = None,
    ) -> None:
        self._targets, self._keep, self._controlled, self._raced = targets, keep, controlled, raced
        optimizer = unwrap_optimizer(run.optimizer)
        self._follows = follows_rule(optimizer)
        if auto:
            _check_auto(run)
        self.own: float = own or probe_rate(run.model, run.optimizer)
        self._still = _groups_at_zero(run)
        self._groups = {at for at, rate in enumerate(group_rates(run.optimizer)) if rate == self.own}
        self._groups |= adapter_rates(run.model, run.optimizer).keys()
        self._plain = np.array([target.scaling_at(REFERENCE_RANK) for target in targets])
        self.rule: float | None = None
        self.initial: InitialLoss | None = initial
        self._decides = auto
        if auto or rule_knows(run):
            self.rule = rate_by_rule(run.model, targets, run.total_steps, initial or TYPICAL)
        self.of_labels: bool = learns_labels(run, initial)
        self._raised = controlled and self.initial != TYPICAL
        self._auto = 1.0
        if auto and self.rule:
            self._auto = (RateRange.around(self.rule).low if self._raised else self.rule) / self.own
        wide = (hidden_width(run.model) or 0) > KNOWN["width"][1]
        self._most = 1.0 if wide else math.inf  # on wider models no plan is known to need more than plain LoRA
        self.factor: float = 1.0
        self.moved: float = 1.0
        self.last: float | torch.Tensor | None = None
        self.share: float = 1.0
        self.lead_in: int = 0
        self.watched: bool = False
        self.repeats: bool = False
        self.step: int = 0
        self.past: dict[int, list[float]] = {}
        self._of_plan, self._scheduler = 1.0, run.scheduler
        self._before: list[tuple[dict[str, Any], Any]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._apply(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._put_back()),
        ]

    @property
    def changes(self) -> bool:
        """True unless the optimizer's rate is simply kept."""
        return self._controlled or self._decides or self._raced or not self._keep

    @property
    def plain(self) -> float:
        """Peak learning rate of plain LoRA, including changes by control of the run."""
        return self.own * self._auto * self.moved

    @property
    def rate(self) -> float:
        """Peak learning rate under the plan."""
        return self.own * self.factor

    @property
    def rates(self) -> tuple[float, float]:
        """Peak learning rates for plain LoRA, and under the plan."""
        return self.plain, self.rate

    def move(self, moved: float) -> None:
        """Multiply the plain rate by `moved` from now on, as chosen by control of the run."""
        self.moved = moved
        self.ranks_changed()

    def ranks_changed(self) -> None:
        """Set the factor of the current plan."""
        if not self._keep and self._follows:
            ranks = np.array([target.rank for target in self._targets], dtype=np.int64)
            of_plan = RULE.factor(ranks, np.array([target.scaling for target in self._targets]), self._plain)
            self._of_plan = min(of_plan, self._most)
        self.factor = self.plain / self.own * self._of_plan

    def told(self) -> str:
        """Return a report line on the rate; empty for a user's rate close to the rule's."""
        lines = []
        if self._still:
            groups = ", ".join(map(str, self._still))
            lines.append(f"Adapters in optimizer group {groups} have a learning rate of 0 and are not trained.")
        if not np.allclose(self._plain, self._plain[0]):
            lines.append("lora_alpha differs between modules (alpha_pattern); each module keeps its own.")
        if self.initial and self.initial.loss < LEAST_LOSS:
            lines.append(f"The loss before training is {self.initial.loss:.2g}. Are the labels correct?")
        if self._raced:
            return " ".join(lines)
        if self._decides and self.rule:
            ends = RateRange.around(self.rule)
            raised = self._raised and not self.of_labels
            begins = "control will raise it during the run" if raised else "control may not raise it here"
            of_plan = "" if self.rate == self.plain else f", {self.rate:.2g} for this plan"
            between = f"between {ends.low:.2g} and {ends.high:.2g} here, around {ends.middle:.2g}"
            begin = f"The run starts at {self.plain:.2g}{of_plan}; {begins}."
            return " ".join([f"The best learning rate for plain LoRA is likely {between}. {begin}", *lines])
        if abs(self.factor - 1) > 0.01:
            lines.append(
                f"The learning rate {self.own:.3g} is taken as plain LoRA's; this plan trains at {self.rate:.3g} "
                "(keep_rate=True keeps yours)."
            )
        if self.rule and not 1 / FAR <= self.own / self.rule <= FAR:
            times = max(self.own / self.rule, self.rule / self.own)
            lines.append(
                f"{self.own:.2g} is {times:.0f} times {'above' if self.own > self.rule else 'below'} the rule's "
                f"rate for plain LoRA here, {self.rule:.2g}; learning_rate='auto' adapts to the run."
            )
        return " ".join(lines)

    def state(self) -> dict[str, Any]:
        """Return the user's rate, and the rule's inputs from the run."""
        return {"own_rate": self.own, "initial": list(astuple(self.initial)) if self.initial else None}

    def end(self) -> None:
        """Restore the optimizer's rate."""
        for hook in self._hooks:
            hook.remove()
        self._put_back()

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        self._put_back()
        scheduled = dict(enumerate(self._scheduler.get_last_lr() if self._scheduler else ()))
        held = [
            (at, group)
            for at, group in enumerate(optimizer.param_groups)
            if at in self._groups and group["lr"] is not None  # None: the optimizer chooses its own
        ]
        if self.watched:
            rates = self.past.setdefault(self.step, [float(group["lr"]) for _, group in held])
            self.share = max(rates, default=self.own) / self.own
            self.lead_in = 0 if self.share < PEAK and not self.step else self.lead_in
        again = self.past[self.step] if self.repeats else None
        rise = min((self.step + 1) / self.lead_in, 1.0) if self.lead_in else 1.0
        for number, (at, group) in enumerate(held):
            rate, given = group["lr"], again[number] if again else group["lr"]
            if isinstance(rate, torch.Tensor):  # for a captured graph, which reads it in place
                self._before.append((group, rate.clone()))
                rate.copy_(torch.as_tensor(given * self.factor * rise))
            else:
                self._before.append((group, rate))
                written = not (again or math.isclose(rate, scheduled.get(at, rate)))
                group["lr"] = given * (self._of_plan if written else self.factor) * rise
        first = optimizer.param_groups[0]["lr"]
        self.last = first.clone() if isinstance(first, torch.Tensor) else first

    def _put_back(self) -> None:
        for group, before in self._before:
            if isinstance(before, torch.Tensor):
                group["lr"].copy_(before)
            else:
                group["lr"] = before
        self._before = []
