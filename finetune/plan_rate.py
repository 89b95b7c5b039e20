"""The learning rate follows the plan: adapters train at the rate of their optimizer times a factor.

The factor is applied around each step of the optimizer, so that schedules, warm-up, several groups, and loops that set
the rate themselves go on as they are. Between two steps the groups show the user's rate. One that a callback of a
Trainer's user writes there, beside its schedule, is no matter of the rule and of control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.batches import predicted_share
from ..errors import ConfigError
from ..lora.optimizer_state import unwrap_optimizer
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule, unwrap
from ..plan.rate import LEAST_LOSS, RULE, TYPICAL, InitialLoss, RateRange
from ..plan.worth import KNOWN
from .run import FIRST_ROWS, FirstRows, Participant, TrainingRun, adapter_rates, own_rate, probe_rate

FAR = 4.0
"""A rate so many times above or below the rule's is told."""

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
"""Names of the hidden width in configurations of models."""

_OWN_RATE = ("prodigy", "dadapt", "schedulefree", "adafactor")
"""Parts of the names of optimizers that choose their rate themselves, or are no Adam."""


def hidden_width(model: nn.Module) -> int | None:
    """The width of a model's hidden states, from its configuration; None where that does not tell."""
    config = getattr(unwrap(model), "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        for name in _WIDTHS:
            width = getattr(holder, name, None)
            if type(width) is int and width > 0:
                return width
    return None


def follows_rule(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is a kind of Adam whose rate its user chooses."""
    name = type(unwrap_optimizer(optimizer)).__name__.lower()
    return "adam" in name and not any(part in name for part in _OWN_RATE)


def check_follows(optimizer: torch.optim.Optimizer, asked: str, instead: str) -> None:
    """Refuse to correct the rate of an optimizer that is no kind of Adam: the alignment of its steps is not known.

    Args:
        optimizer: of the run.
        asked: what its user asked for, for the error.
        instead: what to do.

    Raises:
        ConfigError: it is none, or chooses its rate itself.
    """
    if not follows_rule(optimizer):
        raise ConfigError(
            f"{asked} corrects the learning rate by the steps of Adam and its variants; "
            f"{type(unwrap_optimizer(optimizer)).__name__} is none, or chooses its rate itself. {instead}"
        )


def rule_knows(run: TrainingRun) -> bool:
    """Whether the rule says something of a run: of its optimizer, its model and its loss."""
    return follows_rule(run.optimizer) and hidden_width(run.model) is not None and not run.learns_preferences


def rate_by_rule(
    model: nn.Module, targets: Sequence[TargetModule], steps: int, initial: InitialLoss = TYPICAL
) -> float:
    """What the rule says for plain LoRA on a model.

    Args:
        model: a PEFT model.
        targets: its adapters, whose alpha decides the scale at rank 8.
        steps: of the run.
        initial: the loss before training, and the tokens of a step.

    Raises:
        ConfigError: the model's configuration does not tell its width.
    """
    width = hidden_width(model)
    if width is None:
        raise ConfigError(
            "learning_rate='auto' needs the width of the model, and the configuration of "
            f"{type(unwrap(model)).__name__} has none of {', '.join(_WIDTHS)}. Give a rate, such as 2e-4."
        )
    return RULE.plain(width, steps, _scale(targets), initial)


def initial_loss(run: TrainingRun, first_rows: FirstRows) -> InitialLoss:
    """What the rule reads off some rows before training; a run that learns labels looks like any.

    Args:
        run: that begins.
        first_rows: what `TrainingRun.read_first_rows` returned.
    """
    loss, counts = first_rows
    if predicted_share(counts) < LABELS or not math.isfinite(loss):
        return TYPICAL
    rows = run.rows * run.accumulation * run.replicas.processes.count
    return InitialLoss(loss, sum(predictions for predictions, _ in counts) / FIRST_ROWS * rows)


LABELS = 0.05
"""A loss that counts a smaller share of the tokens is of labels."""


def learns_labels(run: TrainingRun, initial: InitialLoss | None) -> bool:
    """Whether a run learns labels: its model has no output layer over tokens, or its loss counts hardly any of them.

    Args:
        run: that begins.
        initial: what `initial_loss` returned; None where no row was read.
    """
    output = getattr(unwrap(run.model), "get_output_embeddings", None)
    return initial == TYPICAL or (output is not None and output() is None)


def _groups_at_zero(run: TrainingRun) -> list[int]:
    """The numbers of the optimizer's groups whose adapters have a rate of 0 while others have one.

    Raises:
        ConfigError: the rate of a group with adapters is negative or not finite.
    """
    rates = adapter_rates(run.model, run.optimizer)
    for group, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise ConfigError(
                f"The optimizer's learning rate is {rate} in group {group}, and nothing trains at that: make the "
                "optimizer with numbers above 0, or use TrainingArguments.learning_rate."
            )
    return [group for group, rate in rates.items() if not rate and any(rates.values())]


def _scale(targets: Sequence[TargetModule]) -> float:
    """The scale of plain LoRA, the geometric mean over the modules."""
    return float(np.exp(np.mean([math.log(target.scaling_at(REFERENCE_RANK)) for target in targets])))


class PlanRate(Participant):
    """Multiplies the learning rate of adapters by what the plan, and the rule if it is to decide, make of it.

    Args:
        run: whose optimizer steps.
        targets: its adapters. Groups of the optimizer that hold none keep their rate.
        auto: begin with what the rule says for plain LoRA; else with the optimizer's own rate.
        controlled: whether the run's steps correct the rate, which begins lower then, but for runs that learn labels.
        keep: leave the rate as it is, whatever the plan.
        initial: the loss before training, and the tokens of a step.
        own: of the attributes, where the run goes on; the optimizer's rate may be anywhere on its schedule then.

    Attributes:
        initial: the loss before training; None where no row was read.
        own: the rate that the optimizer begins with or warms up to.
        of_labels: whether the run learns labels.
        rule: what the rule says for plain LoRA; None where the optimizer is no Adam, or the width is unknown.
        factor: by which the rate is multiplied now.
        moved: the part of it that control of the run has added.
        last: the rate of the optimizer's first group in its last step; None before one.

    Raises:
        ConfigError: the optimizer's rate is negative or not finite; or `auto`, and the rule says nothing here: of
            another optimizer, or of losses that compare answers.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        *,
        auto: bool,
        controlled: bool = False,
        keep: bool,
        initial: InitialLoss | None = None,
        own: float | None = None,
    ) -> None:
        self._targets, self._keep = targets, keep
        self._adapters = {id(weight) for target in targets for weight in target.parameters.values()}
        optimizer = unwrap_optimizer(run.optimizer)
        self._follows = follows_rule(optimizer)
        if auto and not self._follows:
            raise ConfigError(
                f"learning_rate='auto' is for Adam and its variants; {type(optimizer).__name__} is none, or chooses "
                "its rate itself. Leave learning_rate out, and give the optimizer the rate that it needs."
            )
        if auto and run.learns_preferences:
            raise ConfigError(
                "learning_rate='auto' is for losses on labels, and the batches of this run have none: losses that "
                "compare answers want far lower rates. Leave learning_rate out, and give the optimizer a rate (DPO: "
                "about 5e-6)."
            )
        if auto and not own_rate(run.model, run.optimizer):
            raise ConfigError(
                "learning_rate='auto' multiplies the rate of the optimizer, which is 0: make the optimizer with any "
                "rate above 0 (TrainingArguments.learning_rate)."
            )
        self.own: float = own or probe_rate(run.model, run.optimizer)
        self._still = _groups_at_zero(run)
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
        self._most = 1.0 if wide else math.inf  # on wider models no plan is known to want more than plain LoRA
        self.factor: float = 1.0
        self.moved: float = 1.0
        self.last: float | torch.Tensor | None = None
        self._of_plan, self._scheduler = 1.0, run.scheduler
        self._before: list[tuple[dict[str, Any], Any]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._apply(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._put_back()),
        ]

    @property
    def plain(self) -> float:
        """The peak of the learning rate of plain LoRA, as far as control of the run has moved it."""
        return self.own * self._auto * self.moved

    @property
    def rate(self) -> float:
        """The peak of the learning rate under the plan."""
        return self.own * self.factor

    @property
    def rates(self) -> tuple[float, float]:
        """The peak of the learning rate for plain LoRA, and under the plan."""
        return self.plain, self.rate

    def move(self, moved: float) -> None:
        """Multiply the plain rate by `moved` from now on, as control of the run has chosen."""
        self.moved = moved
        self.ranks_changed()

    def ranks_changed(self) -> None:
        """Take the factor of the plan that is in place."""
        if not self._keep and self._follows:
            ranks = np.array([target.rank for target in self._targets], dtype=np.int64)
            of_plan = RULE.factor(ranks, np.array([target.scaling for target in self._targets]), self._plain)
            self._of_plan = min(of_plan, self._most)
        self.factor = self.plain / self.own * self._of_plan

    def told(self) -> str:
        """A line on the rate; empty where it is the user's, and near the rule's."""
        lines = []
        if self._still:
            groups = ", ".join(map(str, self._still))
            lines.append(f"Adapters in group {groups} of the optimizer have a learning rate of 0, and train nothing.")
        if not np.allclose(self._plain, self._plain[0]):
            lines.append("Modules differ in lora_alpha (alpha_pattern): each keeps its own.")
        if self.initial and self.initial.loss < LEAST_LOSS:
            lines.append(f"The loss is {self.initial.loss:.2g} before training: are the labels right?")
        if self._decides and self.rule:
            ends = RateRange.around(self.rule)
            raised = self._raised and not self.of_labels
            begins = "steps of the run raise it" if raised else "no steps are sure to raise it here"
            of_plan = "" if self.rate == self.plain else f", {self.rate:.2g} under this plan"
            between = f"between {ends.low:.2g} and {ends.high:.2g} here, with {ends.middle:.2g} in the middle"
            begin = f"The run begins at {self.plain:.2g}{of_plan}; {begins}."
            return " ".join([f"The best learning rate of plain LoRA is likely {between}. {begin}", *lines])
        if abs(self.factor - 1) > 0.01:
            lines.append(
                f"The learning rate of {self.own:.3g} is read as that of plain LoRA; this plan trains at "
                f"{self.rate:.3g} (keep_rate=True leaves it)."
            )
        if self.rule and not 1 / FAR <= self.own / self.rule <= FAR:
            times = max(self.own / self.rule, self.rule / self.own)
            lines.append(
                f"{self.own:.2g} is {times:.0f} times {'above' if self.own > self.rule else 'below'} what the rule "
                f"says for plain LoRA here, {self.rule:.2g}; learning_rate='auto' looks at the run."
            )
        return " ".join(lines)

    def state(self) -> dict[str, Any]:
        """The user's rate, and what the rule has read off the run."""
        return {"own_rate": self.own, "initial": list(astuple(self.initial)) if self.initial else None}

    def end(self) -> None:
        """Leave the rate as the optimizer has it."""
        for hook in self._hooks:
            hook.remove()
        self._put_back()

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        self._put_back()
        scheduled = dict(enumerate(self._scheduler.get_last_lr() if self._scheduler else ()))
        for at, group in enumerate(optimizer.param_groups):
            rate = group["lr"]
            if rate is None or not any(id(parameter) in self._adapters for parameter in group["params"]):
                continue  # None: the optimizer finds its own
            if isinstance(rate, torch.Tensor):  # of a captured graph, which reads it where it is
                self._before.append((group, rate.clone()))
                rate.mul_(self.factor)
            else:
                self._before.append((group, rate))
                written = not math.isclose(rate, scheduled.get(at, rate))
                group["lr"] = rate * (self._of_plan if written else self.factor)
        first = optimizer.param_groups[0]["lr"]
        self.last = first.clone() if isinstance(first, torch.Tensor) else first

    def _put_back(self) -> None:
        for group, before in self._before:
            if isinstance(before, torch.Tensor):
                group["lr"].copy_(before)
            else:
                group["lr"] = before
        self._before = []
