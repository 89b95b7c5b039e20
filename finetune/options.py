"""Run options, declared once for the Trainer, training loops and static plans, plus those of `rankpilot finetune`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..common.checks import is_count
from ..common.errors import REMOVED, ConfigError, UnknownNameError, shown
from ..cost.budget import Budget, GivenBudget, budget_now
from ..cost.step_config import Checkpointing, StepConfig, check_seed
from ..data.task import Task
from ..decide.plan.goal import Goal, GoalKind, goal_of
from ..decide.plan.problem import Bounds, bound_of
from ..decide.settings import DecisionSchedule
from ..lora.spec import Scaling, check_scaling


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Limits and goal of a plan: the options shared with the command line.

    Attributes:
        budget: limit that no training step may exceed: "24GiB" for everything on the device, frozen model
            included; "6GiB step" for a step on top of the frozen model; "80%" of the memory of a step with the adapter
            as it is passed; "auto" for nine tenths of the free device memory; or "300k params", which counts only the
            adapter's parameters.
        exact_savers: let adapters share copies of their inputs, and tile the loss of a language model: the same losses
            and gradients in fewer bytes, at no cost in time.
        gradient_checkpointing: "auto" checkpoints as few layers as the plan needs, and all of them under goal bytes:
            less memory, more time, the same losses. True checkpoints all layers, False none. A model that already
            checkpoints is left alone. Under goal time, or with a budget in parameters, "auto" means False.
        parts: "auto" splits a batch into parts, each padded to its own longest row, with only the checkpointed layers
            it needs: the same gradient in less time and fewer bytes. It applies where the loss is known to be a sum
            over rows or tokens, such as the losses of transformers and TRL (docs/parts.md). Plans
            are then priced with one row. "off" runs each batch whole, as does a budget in parameters.
        stream: frozen weights of layers in main memory, each on the device only while its layer runs: the same losses
            for a base that is too large for the device. Under a budget for everything on the device ("12GiB") that does
            not hold the LoRA with the whole base, "auto" streams as few layers as make room for it; a number streams
            this many layers, "off" none (docs/savers.md). Not timed on a GPU yet.
        goal: quality (the default of a policy that chooses), the lowest loss within the budget; time or bytes, the
            cheapest plan whose loss is surely within the tolerance of rank 8 on all modules.
        tolerance: allowed increase of the log loss under goal time or bytes: 0.01, the default, is 1 %.
        keep_rate: train at the given learning rate. By default it is read as the rate of plain LoRA, and a plan with
            fewer adapted modules trains at a higher one (docs/learning-rate.md).

    Raises:
        BudgetError: the budget cannot be parsed.
        ConfigError: a value is out of range, or two options conflict.
    """

    budget: str | float | Budget = "100%"
    exact_savers: bool = True
    gradient_checkpointing: Checkpointing = "auto"
    parts: Literal["auto", "off"] = "auto"
    stream: int | Literal["auto", "off"] = "auto"
    goal: GoalKind | None = None
    tolerance: float | None = None
    keep_rate: bool = False

    def __post_init__(self) -> None:
        _check_switch("exact_savers", self.exact_savers)
        _check_switch("keep_rate", self.keep_rate)
        if self.gradient_checkpointing not in (True, False, "auto"):
            raise ConfigError(
                f'gradient_checkpointing must be "auto", True or False; got {shown(self.gradient_checkpointing)}.'
            )
        if self.parts not in ("auto", "off"):
            raise ConfigError(
                f'parts must be "auto" or "off"; got {shown(self.parts)}. Only known losses run in parts.'
            )
        if self.stream not in ("auto", "off") and not is_count(self.stream):
            raise ConfigError(f'stream is "auto", "off" or a number of layers, at least 1; got {shown(self.stream)}.')
        _ = self.aim

    @property
    def budget_read(self) -> Budget:
        """The parsed budget."""
        return Budget.parse(self.budget)

    @property
    def aim(self) -> Goal:
        """The goal and its tolerance."""
        return goal_of(self.goal or "quality", self.tolerance, budget_unit=self.budget_read.unit)

    @property
    def chooses_layers(self) -> bool:
        """True if the plan decides which layers are checkpointed."""
        return self.gradient_checkpointing == "auto" and self.budget_read.kind != "parameters" and self.goal != "time"


@dataclass(frozen=True, kw_only=True)
class PilotOptions(PlanOptions):
    """Options of a run, accepted by `attach`, `RankPilot` and `allocate`.

    Each of them also takes single options by name: `attach(trainer, budget="80%", goal="time")` is
    `attach(trainer, "default", PilotOptions(budget="80%", goal="time"))`.

    Attributes:
        budget: as in `PlanOptions`, or a function without arguments that returns a budget, called before each step.
            "auto" and functions are followed during the run: the plan shrinks before a step that would not fit, and
            grows back when memory is free again.
        bounds: the rank of single modules, or their minimum and maximum rank, by module name or its suffix:
            `{"q_proj": 8, "layers.0.mlp.down_proj": (0, 4)}`.
        schedule: when to decide; defaults to the schedule the policy was trained with.
        scaling: what stays constant when a rank changes: "alpha", the model's `lora_alpha`, so one learning rate fits
            all ranks; or "constant", the model's initial factor `lora_alpha / r` (docs/learning-rate.md).
        fresh: start with new adapters. By default trained adapters are kept, and the first plan resizes them.
        seed: seed of the probe and of new adapter rows; defaults to `TrainingArguments.seed` under a Trainer, and to 0
            in a loop.
        measure_every: steps between measurements of the real peak, which is also measured after each change of ranks.
        log: folder of the decision log. Defaults to `decisions` in a Trainer's output folder, and to no log in a loop.
        learning_rate: "auto" replaces the optimizer's rate by a rule based on the model and the length of the run. With
            control on texts the run starts at seven tenths of it, and its steps raise it. For Adam and its variants.
            "race" measures it: half, once and twice the rule's rate (the optimizer's, where the rule does not apply)
            take turns on the first batches, and the best continues (docs/learning-rate.md). "race 5" spans a factor of
            16 instead of 4; (1e-4, 2e-4, 4e-4) races your own rates.
        control: correct the learning rate in the first half of the run from its steps, and undo damage done by too high
            a rate (docs/learning-rate.md). For Adam and its variants, and runs of 60 steps or more. On by default under
            learning_rate="auto", off for a rate of your own. Has no effect on labels.

    Example:
        >>> options = PilotOptions(budget="80%", goal="time", bounds={"q_proj": 8})
    """

    budget: GivenBudget = "100%"  # type: ignore[assignment]
    bounds: Bounds | None = None
    schedule: DecisionSchedule | None = None
    scaling: Scaling = "alpha"
    fresh: bool = False
    seed: int | None = None
    measure_every: int = 100
    log: str | Path | None = None
    learning_rate: str | Sequence[float] | None = None
    control: bool | None = None

    @property
    def budget_read(self) -> Budget:
        """The parsed budget; if it is a function, its current value."""
        return budget_now(self.budget)

    @property
    def asks_for_ranks(self) -> bool:
        """True if an option only makes sense where ranks are chosen: they are, even without a policy."""
        chosen = (self.goal, self.tolerance, self.bounds, self.schedule)
        return self.fresh or any(option is not None for option in chosen)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rate()
        if self.schedule is not None and not isinstance(self.schedule, DecisionSchedule):
            raise ConfigError(f"schedule must be a rankpilot.DecisionSchedule or None; got {self.schedule!r}.")
        if not is_count(self.measure_every):
            raise ConfigError(f"measure_every must be a number of steps, at least 1; got {shown(self.measure_every)}.")
        if self.log is not None and not (isinstance(self.log, str | Path) and str(self.log)):
            raise ConfigError(f"log must be a folder path or None; got {shown(self.log)}.")
        if self.seed is not None:
            check_seed(self.seed)
        check_scaling(self.scaling)
        _check_switch("fresh", self.fresh)
        if self.control is not None:
            _check_switch("control", self.control)
        if self.bounds is not None and not isinstance(self.bounds, Mapping):
            raise ConfigError(f"bounds must be a dictionary from module names to ranks; got {shown(self.bounds)}.")
        for name, bound in (self.bounds or {}).items():
            bound_of(name, bound)

    def _check_rate(self) -> None:
        rate = self.learning_rate
        if isinstance(rate, list | tuple):
            numbers = all(isinstance(each, int | float) and 0 < each < math.inf for each in rate)
            if not numbers or len(set(rate)) != len(rate) or not 2 <= len(rate) <= MOST_LANES:
                raise ConfigError(
                    f"learning_rate races 2 to {MOST_LANES} different rates above 0; got {shown(rate)}. Pass a single "
                    "rate to the optimizer (TrainingArguments.learning_rate)."
                )
        elif rate not in (None, "auto") and not (isinstance(rate, str) and _RACE.fullmatch(rate)):
            raise ConfigError(
                f'learning_rate must be "auto", "race", "race 5" for more rates, several rates to race, such as (1e-4, '
                f"2e-4, 4e-4), or None to keep the optimizer's; got {shown(rate)}. To set a rate of your own, pass it "
                "to the optimizer (TrainingArguments.learning_rate)."
            )
        if self.races and self.control:
            raise ConfigError("control=True corrects the learning rate that a race has measured. Drop one of the two.")

    @property
    def races(self) -> bool:
        """True if learning rates race."""
        return self.learning_rate not in (None, "auto")

    @property
    def raced_factors(self) -> tuple[float, ...]:
        """Factors of racing rates on the rule's, a factor of two apart; empty unless the rule's rate races."""
        found = _RACE.fullmatch(self.learning_rate) if isinstance(self.learning_rate, str) else None
        count = int(found.group(1) or 3) if found else 0
        return tuple(2.0 ** (lane - count // 2) for lane in range(count))

    @classmethod
    def of(cls, options: GivenOptions, changes: Mapping[str, Any]) -> PilotOptions:
        """Build options from shared ones and changes.

        Args:
            options: shared options, or a budget alone; None for the defaults.
            changes: new values by option name.

        Raises:
            UnknownNameError: there is no such option.
            ConfigError, BudgetError: a value is invalid, or the option was removed.
        """
        names = [each.name for each in fields(cls)]
        for name in changes:
            if name in REMOVED:
                raise ConfigError(f"The option {name} was removed: {REMOVED[name]}")
            if name not in names:
                raise UnknownNameError.of("option", name, names)
        if isinstance(options, cls):
            return replace(options, **changes)
        alone: dict[str, Any] = {} if options is None else {"budget": options}
        return cls(**alone | dict(changes))


MOST_LANES = 7
"""Maximum number of learning rates in a race."""

_RACE = re.compile(r"race(?: ([2-7]))?")


GivenOptions = PilotOptions | GivenBudget | None
"""All options, a budget alone, or None for the defaults."""


def _check_switch(name: str, switch: object) -> None:
    if not isinstance(switch, bool):
        raise ConfigError(f"{name} must be True or False; got {switch!r}.")


_RANK = re.compile(r"[0-9]{1,10}")

MOST_STEPS = 10**9
"""Largest number of steps, epochs or rows that an option accepts."""

PILOT, UNIFORM, ALL_LINEAR = RUNS = ("rankpilot", "uniform", "all-linear")
"""The run under a policy and its possible baselines: names of folders, also used in reports."""


@dataclass(frozen=True)
class FinetuneConfig(StepConfig, PlanOptions):
    """Model, data, policy and length of a fine-tune.

    Attributes:
        model: a packaged model (rankpilot assets lists them), a Hugging Face id or a local folder.
        data: a packaged data set, a Hugging Face id, a local file (csv, json, jsonl, parquet, txt) or a folder.
        policy: what decides the ranks: "default", which chooses a plan; "agent", the trained agent shipped with
            rankpilot, which steers a run; the folder of another trained policy; a rule such as signal-mean (rankpilot
            policy evaluate --help lists the rules); or a plan written by rankpilot plan and edited by you (plan.yaml).
        compare_uniform: also run uniform rank in the same budget (one rank on as many top layers as can have rank 8),
            and compare.
        compare_all_linear: also run plain LoRA, rank 8 on all modules, without any budget, and compare.
        task: classification, or causal-lm (texts, prompts with completions, and chats with tools, as TRL reads them);
            inferred from the columns of the data by default.
        steps: optimizer steps of the run.
        epochs: passes over the training rows, instead of steps.
        learning_rate: peak rate of plain LoRA; it decays linearly to zero. auto starts at seven tenths of
            the rate predicted from the model's width, the length of the run and the loss before training, and corrects
            it during the run; the plan adds a factor (keep_rate). race
            measures half, once and twice that rate in the first steps, and continues with the best.
        alpha: lora_alpha of every adapter.
        scaling: factor on an adapter's output at rank r: alpha, alpha / r; rslora, alpha / sqrt(r); constant, alpha / 8
            at every rank. Under alpha one learning rate fits all ranks.
        train_rows: maximum number of training rows; all of them by default.
        held_out_rows: maximum number of held-out rows.
        text_column: name of the column with the text.
        label_column: name of the column with the class.
        seed: seed of all random numbers.
        eval_every: optimizer steps between evaluations, each followed by a checkpoint.
        eval_batch_size: rows per evaluation batch; defaults to the training batch size, which keeps evaluations within
            the budget.
        best: end with the checkpoint of the lowest held-out loss.
        early_stopping: stop after this many evaluations without a lower held-out loss, and end with the best
            checkpoint.
        bounds: ranks of single modules, or their minimum and maximum rank: q_proj=8 down_proj=0:4.
        merge: also save the model with the adapter merged into it.
        report_to: trackers of losses, ranks and peaks: tensorboard, wandb, trackio, mlflow ...
        trainer: further settings of transformers' TrainingArguments (TRL's SFTConfig for causal-lm), as NAME=VALUE:
            warmup_steps=0.1 lr_scheduler_type=cosine optim=paged_adamw_8bit assistant_only_loss=true.
        control: correct the learning rate in the first half of the run, including your own (docs/learning-rate.md).
        stream: layers whose frozen weights wait in main memory, for a base too large for the card: auto, as few as a
            budget such as 12GiB requires; off; or a number.

    Raises:
        ConfigError: a value is out of range.
        BudgetError: the budget cannot be parsed.
    """

    model: str
    data: str
    policy: str = "default"
    compare_uniform: bool = False
    compare_all_linear: bool = False
    task: Task | None = None
    steps: int = 200
    learning_rate: float | Literal["auto", "race"] = "auto"
    alpha: float = 16.0
    scaling: Literal["alpha", "rslora", "constant"] = "alpha"
    train_rows: int | None = None
    held_out_rows: int | None = 800
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0
    eval_every: int = 50
    epochs: float | None = None
    eval_batch_size: int | None = None
    best: bool = False
    early_stopping: int | None = None
    bounds: tuple[str, ...] = ()
    merge: bool = False
    report_to: tuple[str, ...] = ()
    trainer: tuple[str, ...] = ()
    control: bool = False
    budget: str = field(default="100%", kw_only=True)  # text

    @property
    def kept(self) -> Scaling:
        """What stays constant when a rank changes: alpha, or the scaling."""
        return "constant" if self.scaling == "constant" else "alpha"

    def pilot_options(self, **further: Any) -> PilotOptions:
        """Return the options of a run under a policy, plus further ones by name, which depend on its folder."""
        shared = {each.name: getattr(self, each.name) for each in fields(PlanOptions)}
        rate = self.learning_rate if isinstance(self.learning_rate, str) else None
        own: dict[str, Any] = {"bounds": rank_bounds_of(self.bounds), "scaling": self.kept}
        own |= {"learning_rate": rate, "control": self.control or None}
        return PilotOptions(**shared | own | further)

    @property
    def keeps_best(self) -> bool:
        """True if the run ends with its best checkpoint."""
        return self.best or self.early_stopping is not None

    def __post_init__(self) -> None:
        StepConfig.__post_init__(self)
        PlanOptions.__post_init__(self)
        given = self.learning_rate
        rates = (self.alpha,) if given in ("auto", "race") else (given, self.alpha)
        numbers = all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates)
        if not (1 <= self.steps <= MOST_STEPS and 1 <= self.eval_every <= MOST_STEPS) or not numbers:
            raise ConfigError(
                f"steps and eval_every must be between 1 and {MOST_STEPS:,}, learning_rate (or auto, race) and alpha "
                f"above 0; got {shown(self.steps)}, {shown(self.eval_every)}, {shown(given)} and {self.alpha}."
            )
        if given == "auto" and "adamw" not in self.optimizer:
            raise ConfigError(
                f"learning_rate auto is for Adam and its variants; with {self.optimizer} pass a rate, such as 1e-3."
            )
        counts = {name: getattr(self, name) for name in ("epochs", "eval_batch_size", "early_stopping")}
        wrong = {name: value for name, value in counts.items() if value is not None and not 0 < value <= MOST_STEPS}
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)} must be above 0 and at most {MOST_STEPS:,}, or left out; got "
                f"{', '.join(map(shown, wrong.values()))}."
            )
        check_seed(self.seed)
        if min(rows for rows in (self.train_rows, self.held_out_rows, 1) if rows is not None) < 1:
            raise ConfigError(
                f"train_rows and held_out_rows must be at least 1, or None for all rows; got {self.train_rows} "
                f"and {self.held_out_rows}."
            )


def rank_bounds_of(given: tuple[str, ...]) -> Bounds:
    """Parse bounds from MODULE=RANK or MODULE=LEAST:MOST.

    Raises:
        ConfigError: an entry has another form.
    """
    bounds: dict[str, int | tuple[int, int]] = {}
    for entry in given:
        name, _, text = entry.partition("=")
        numbers = text.split(":")
        if not name or len(numbers) > 2 or not all(_RANK.fullmatch(number) for number in numbers):
            raise ConfigError(
                f"A bound must have the form MODULE=RANK or MODULE=LEAST:MOST, such as q_proj=0:16; got {shown(entry)}."
            )
        ranks = [int(number) for number in numbers]
        bounds[name] = ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])
    return bounds
