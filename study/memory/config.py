"""Settings of `rankpilot memory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...data.task import Task
from ...errors import ConfigError
from ...memory.budget import Budget

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw8bit"]


@dataclass(frozen=True)
class MemoryConfig:
    """What `rankpilot memory` looks at: a model, an adapter and a batch.

    Attributes:
        model: packaged name, Hugging Face id or local folder.
        data: packaged name, Hugging Face id, local file or folder; its longest rows make the batch. Without it the
            batch is random token ids, all rows of the full length.
        rank: of the adapter on every target module.
        batch_size: rows on the device at once.
        max_length: tokens a row.
        task: classification or causal-lm; without one by the data's columns, or else by the model's architecture.
        labels: classes of a classification without data.
        target_modules: as in `peft.LoraConfig`; "all-linear" or names separated by commas.
        optimizer: decides what is kept for each weight: adamw two numbers, sgd none, adafactor one at the most,
            adamw8bit two bytes (needs the extra rankpilot[quant]).
        bf16: compute in bfloat16 where autocast does, as the Trainer's bf16=True.
        checkpointing: gradient checkpointing: layers keep their inputs alone and run again in the backward pass.
        budget: show which plans the rules make inside it, and what fits: "6GiB", "350MB", "80%" of what rank 8 takes,
            "300k params" or "auto" (what is free on the device).
        measure: run real steps too, and show predicted beside measured bytes.
        text_column: column with the text.
        label_column: column with the class.
        seed: of random ids and fresh adapters.

    Raises:
        ConfigError: a value out of range.
        BudgetError: the budget is unreadable.
    """

    model: str
    data: str | None = None
    rank: int = 8
    batch_size: int = 16
    max_length: int = 64
    task: Task | None = None
    labels: int = 2
    target_modules: str = "all-linear"
    optimizer: OptimizerName = "adamw"
    bf16: bool = False
    checkpointing: bool = False
    budget: str | None = None
    measure: bool = False
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is not None:
            Budget.parse(self.budget)
        if min(self.rank, self.batch_size) < 1 or min(self.max_length, self.labels) < 2:
            raise ConfigError(
                "rank and batch_size are at least 1, max_length and labels at least 2; got "
                f"{self.rank}, {self.batch_size}, {self.max_length} and {self.labels}."
            )
