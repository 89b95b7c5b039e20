"""Settings of `rankpilot finetune`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..allocation.goal import GoalKind, goal_of
from ..data.task import Task
from ..errors import ConfigError
from ..lora.scaling_names import Scaling
from ..memory.budget import Budget, TimeBudget
from ..memory.step_config import StepConfig, check_seed

PILOT, UNIFORM, ALL_LINEAR = RUNS = ("rankpilot", "uniform", "all-linear")
"""The run under a policy, and those that it may be compared with: names of folders, and in what is written."""


@dataclass(frozen=True)
class FinetuneConfig(StepConfig):
    """What a fine-tune runs on, who decides its ranks, and how long it trains.

    Attributes:
        model: a packaged model (rankpilot assets lists them), a Hugging Face id or a local folder.
        data: a packaged data set, a Hugging Face id, a local file (csv, json, jsonl, parquet, txt) or a folder.
        policy: who decides the ranks: "default", the policy that ships with rankpilot; the folder of a trained policy;
            a rule such as signal-mean (rankpilot evaluate --help lists the rules); or a plan that rankpilot allocate
            wrote and you edited (plan.yaml).
        budget: limit that no training step may exceed: "6GiB", "350MB", "80%" of what plain LoRA takes (rank 8 on all
            modules), "auto" for nine tenths of what is free on the device, or "300k params", which counts the adapter's
            parameters alone.
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
        recompute: run as few layers again in the backward pass as the plan needs (gradient checkpointing, layer by
            layer): less memory, more time, the same losses. A share is then one of what plain LoRA takes without.
            A policy with networks uses it only where it expects a loss that is lower by more than 1 %.
        time: what a step may take in time, beside the budget: "75%" of what plain LoRA takes where no layer runs
            again, or "0.8s". Measured before training.
        explore: draw each plan at this temperature (0.05, say) and log its probability, so that the log can tell what
            other policies would have been worth.
        goal: quality, the lowest loss within the budget; time or bytes, the cheapest plan whose loss is surely within
            the tolerance of rank 8 on all modules.
        tolerance: by how much the log loss may be higher under goal time or bytes: 0.01, the default, is 1 %.
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
    budget: str = "100%"
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
    recompute: bool = False
    time: str | None = None
    explore: float | None = None
    goal: GoalKind = "quality"
    tolerance: float | None = None
    merge: bool = False
    report_to: tuple[str, ...] = ()
    trainer: tuple[str, ...] = ()

    @property
    def kept(self) -> Scaling:
        """What stays when a rank changes: alpha, or the scaling."""
        return "constant" if self.scaling == "constant" else "alpha"

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best checkpoint."""
        return self.best or self.early_stopping is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.parse(self.budget)
        if self.time is not None:
            TimeBudget.parse(self.time)
        goal_of(self.goal, self.tolerance, budget_unit=Budget.parse(self.budget).unit, recompute=self.recompute)
        if self.explore is not None and not self.explore > 0:
            raise ConfigError(f"explore is a temperature above 0, such as 0.05; got {self.explore}.")
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
