"""Settings of `rankpilot finetune`."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.task import Task
from ..errors import ConfigError
from ..memory.budget import Budget
from ..memory.step_config import StepConfig, check_seed


@dataclass(frozen=True)
class FinetuneConfig(StepConfig):
    """What a fine-tune runs on, who decides its ranks, and how long it trains.

    Attributes:
        model: a packaged model (rankpilot assets lists them), a Hugging Face id or a local folder.
        data: a packaged data set, a Hugging Face id, a local file (csv, json, jsonl, parquet, txt) or a folder.
        policy: who decides the ranks: "default", the policy that ships with rankpilot; the folder of a trained policy;
            or a rule such as signal-mean (rankpilot evaluate --help lists the rules).
        budget: limit that no training step may exceed: "6GiB", "350MB", "80%" of what uniform rank 8 takes, "auto" (90
            % of what is free on the device), or "300k params", which counts the adapter's parameters alone.
        compare_uniform: also run LoRA with one rank on all modules in the same budget, and compare.
        task: classification, regression, token-classification, seq2seq or causal-lm; without it, the columns of the
            data decide.
        steps: optimiser steps of the run.
        learning_rate: learning rate of the first step; it falls to zero along a straight line.
        scaling: factor in front of the adapter's output (lora_alpha / r), the same at every rank.
        train_rows: use at most so many training rows; all of them by default.
        held_out_rows: use at most so many held-out rows.
        text_column: name of the column with the text, or with the tokens.
        label_column: name of the column with the class, the number, the tags or the target text.
        seed: seed of all random numbers.
        eval_every: optimiser steps from one evaluation and checkpoint to the next.

    Raises:
        ConfigError: a value is out of range.
        BudgetError: the budget cannot be read.
    """

    model: str
    data: str
    policy: str = "default"
    budget: str = "100%"
    compare_uniform: bool = False
    task: Task | None = None
    steps: int = 200
    learning_rate: float = 1e-3
    scaling: float = 2.0
    train_rows: int | None = None
    held_out_rows: int | None = 800
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0
    eval_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.parse(self.budget)
        if min(self.steps, self.eval_every) < 1 or self.learning_rate <= 0 or self.scaling <= 0:
            raise ConfigError(
                "steps and eval_every are at least 1, learning_rate and scaling above 0; got "
                f"{self.steps}, {self.eval_every}, {self.learning_rate} and {self.scaling}."
            )
        check_seed(self.seed)
        if min(rows for rows in (self.train_rows, self.held_out_rows, 1) if rows is not None) < 1:
            raise ConfigError(
                f"train_rows and held_out_rows are at least 1, or None for all rows; got {self.train_rows} and "
                f"{self.held_out_rows}."
            )
