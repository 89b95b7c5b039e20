"""Settings of `rankpilot memory`."""

from __future__ import annotations

from dataclasses import dataclass

from ...data.task import Task
from ...errors import ConfigError
from ...memory.budget import Budget
from ...memory.step_config import StepConfig, check_seed


@dataclass(frozen=True)
class MemoryConfig(StepConfig):
    """The training step that `rankpilot memory` looks at: a model with an adapter, on a batch.

    Attributes:
        model: a packaged model (rankpilot assets lists them), a Hugging Face id or a local folder.
        data: a packaged data set, a Hugging Face id, a local file or folder; its longest rows make the batch. Without
            data, the batch holds random token ids, and all its rows have the full length.
        rank: rank of the adapter on every target module.
        task: classification, regression, token-classification, seq2seq or causal-lm; without it, the columns of the
            data decide, or else the model's architecture.
        labels: number of classes or tags, for a classification without data.
        budget: also show which plans the rules make inside this budget, and what fits it: "6GiB", "350MB", "80%" of
            what uniform rank 8 takes, "300k params" or "auto" (90 % of what is free on the device).
        measure: also run real steps, and show measured beside predicted bytes.
        text_column: name of the column with the text, or with the tokens.
        label_column: name of the column with the class, the number, the tags or the target text.
        seed: seed of random token ids and fresh adapters.

    Raises:
        ConfigError: a value is out of range.
        BudgetError: the budget cannot be read.
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
        check_seed(self.seed)
