"""Settings of `rankpilot memory`."""

from __future__ import annotations

from dataclasses import dataclass

from ...data.task import Task
from ...errors import ConfigError
from ...memory.budget import Budget
from ...memory.step_config import StepConfig


@dataclass(frozen=True)
class MemoryConfig(StepConfig):
    """What `rankpilot memory` looks at: a training step, of a model with an adapter on a batch.

    Attributes:
        model: packaged name, Hugging Face id or local folder.
        data: packaged name, Hugging Face id, local file or folder; its longest rows make the batch. Without it the
            batch is random token ids, all rows of the full length.
        rank: of the adapter on every target module.
        task: classification or causal-lm; without one by the data's columns, or else by the model's architecture.
        labels: classes of a classification without data.
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
    task: Task | None = None
    labels: int = 2
    budget: str | None = None
    measure: bool = False
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.rank < 1 or self.labels < 2:
            raise ConfigError(f"rank is at least 1 and labels at least 2; got {self.rank} and {self.labels}.")
