"""Settings of `rankpilot finetune`."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.task import Task
from ..errors import ConfigError
from ..memory.budget import Budget
from ..memory.step_config import StepConfig


@dataclass(frozen=True)
class FinetuneConfig(StepConfig):
    """A fine-tune.

    Attributes:
        model: packaged name, Hugging Face id or local folder.
        data: packaged name, Hugging Face id, local file or folder.
        policy: "default", which ships with the package, the folder of a trained one, or a rule.
        budget: see `Budget.parse`.
        compare_uniform: also run uniform LoRA in the same budget.
        task: classification or causal-lm; by the data's columns if None.
        steps: optimiser steps.
        learning_rate: peak of a linear decay.
        scaling: constant factor in front of B A (lora_alpha / r).
        train_rows: at most so many training rows.
        held_out_rows: at most so many held-out rows.
        text_column: column with the text.
        label_column: column with the class.
        seed: of everything.
        eval_every: steps between evaluations and checkpoints.

    Raises:
        ConfigError: a value out of range.
        BudgetError: the budget is unreadable.
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
