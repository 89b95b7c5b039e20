"""Settings of `rankpilot finetune`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ..cost.step_config import StepConfig, check_seed
from ..data.task import Task
from ..errors import ConfigError, shown
from ..lora.spec import Scaling
from .options import PilotOptions, PlanOptions

if TYPE_CHECKING:
    from ..plan.problem import Bounds

_RANK = re.compile(r"[0-9]{1,10}")

PILOT, UNIFORM, ALL_LINEAR = RUNS = ("rankpilot", "uniform", "all-linear")
"""The run under a policy, and those that it may be compared with: names of folders, and in what is written."""


@dataclass(frozen=True)
class FinetuneConfig(StepConfig, PlanOptions):
    """What a fine-tune runs on, who decides its ranks, and how long it trains.

    Attributes:
        model: a packaged model (rankpilot assets lists them), a Hugging Face id or a local folder.
        data: a packaged data set, a Hugging Face id, a local file (csv, json, jsonl, parquet, txt) or a folder.
        policy: who decides the ranks: "default", the policy that ships with rankpilot; the folder of a trained policy;
            a rule such as signal-mean (rankpilot evaluate --help lists the rules); or a plan that rankpilot allocate
            wrote and you edited (plan.yaml).
        compare_uniform: also run uniform rank in the same budget, which is one rank on as many top layers as can have
            rank 8, and compare.
        compare_all_linear: also run plain LoRA, rank 8 on all modules, without any budget, and compare.
        task: classification, regression, token-classification, seq2seq or causal-lm; without it, the columns of the
            data decide.
        steps: optimiser steps of the run.
        epochs: passes over the training rows, in place of steps.
        learning_rate: learning rate of the first step; it falls to zero along a straight line.
        alpha: lora_alpha of every adapter.
        scaling: the factor in front of an adapter's output at rank r: alpha, alpha / r; rslora, alpha / sqrt(r);
            constant, alpha / 8 at every rank. Under alpha one learning rate fits all ranks.
        train_rows: use at most so many training rows; all of them by default.
        held_out_rows: use at most so many held-out rows.
        text_column: name of the column with the text, or with the tokens.
        label_column: name of the column with the class, the number, the tags or the target text.
        seed: seed of all random numbers.
        eval_every: optimiser steps from one evaluation and checkpoint to the next.
        eval_batch_size: rows that an evaluation processes at once; by default the training batch, so that evaluations
            stay within the budget.
        best: end with the checkpoint that had the lowest held-out loss.
        early_stopping: stop after so many evaluations without a lower held-out loss, and end with the best checkpoint.
        bounds: ranks of single modules, or their least and largest rank: q_proj=8 down_proj=0:4.
        merge: also save the model with the adapter merged into it.
        report_to: trackers that get losses, ranks and peaks: tensorboard, wandb, trackio, mlflow ...
        trainer: further settings of transformers' TrainingArguments (TRL's SFTConfig for causal-lm), as NAME=VALUE:
            warmup_steps=0.1 lr_scheduler_type=cosine optim=paged_adamw_8bit assistant_only_loss=true.

    Raises:
        ConfigError: a value is out of range.
        BudgetError: the budget or the time cannot be read.
    """

    model: str
    data: str
    policy: str = "default"
    compare_uniform: bool = False
    compare_all_linear: bool = False
    task: Task | None = None
    steps: int = 200
    learning_rate: float = 1e-3
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
    budget: str = field(default="100%", kw_only=True)  # as text, as `time`
    time: str | None = field(default=None, kw_only=True)

    @property
    def kept(self) -> Scaling:
        """What stays when a rank changes: alpha, or the scaling."""
        return "constant" if self.scaling == "constant" else "alpha"

    def pilot_options(self, **further: Any) -> PilotOptions:
        """The options of a run under a policy, with further ones by name, which its folder decides."""
        shared = {each.name: getattr(self, each.name) for each in fields(PlanOptions)}
        return PilotOptions(**shared | {"bounds": rank_bounds_of(self.bounds), "scaling": self.kept} | further)

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best checkpoint."""
        return self.best or self.early_stopping is not None

    def __post_init__(self) -> None:
        StepConfig.__post_init__(self)
        PlanOptions.__post_init__(self)
        rates = (self.learning_rate, self.alpha)
        if min(self.steps, self.eval_every) < 1 or not all(0 < rate < math.inf for rate in rates):
            raise ConfigError(
                "steps and eval_every are at least 1, learning_rate and alpha above 0; got "
                f"{self.steps}, {self.eval_every}, {self.learning_rate} and {self.alpha}."
            )
        counts = {name: getattr(self, name) for name in ("epochs", "eval_batch_size", "early_stopping")}
        wrong = {name: value for name, value in counts.items() if value is not None and not 0 < value < math.inf}
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: a number above 0, or left out; got {list(wrong.values())}.")
        check_seed(self.seed)
        if self.recompute and self.checkpointing:
            raise ConfigError(
                "checkpointing runs all layers again, recompute as few as the plan needs: give one of them."
            )
        if min(rows for rows in (self.train_rows, self.held_out_rows, 1) if rows is not None) < 1:
            raise ConfigError(
                f"train_rows and held_out_rows are at least 1, or None for all rows; got {self.train_rows} and "
                f"{self.held_out_rows}."
            )


def rank_bounds_of(given: tuple[str, ...]) -> Bounds:
    """Bounds from MODULE=RANK or MODULE=LEAST:MOST.

    Raises:
        ConfigError: an entry has another form.
    """
    bounds: dict[str, int | tuple[int, int]] = {}
    for entry in given:
        name, _, text = entry.partition("=")
        numbers = text.split(":")
        if not name or len(numbers) > 2 or not all(_RANK.fullmatch(number) for number in numbers):
            raise ConfigError(
                f"A bound has the form MODULE=RANK or MODULE=LEAST:MOST, as q_proj=0:16; got {shown(entry)}."
            )
        ranks = [int(number) for number in numbers]
        bounds[name] = ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])
    return bounds
