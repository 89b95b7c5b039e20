"""Fine-tuning tasks, for settings used before any library is loaded."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["classification", "causal-lm"]


ELSE = "For other tasks, call rankpilot.attach on your own Trainer."
"""Hint of errors on data for other tasks."""


@dataclass(frozen=True)
class TaskKind:
    """Library names of a task.

    Attributes:
        auto_class: class of transformers to load a model with the matching head.
        peft_type: PEFT's `task_type`.
        has_head: True if a head is trained in addition to the adapters.
    """

    auto_class: str
    peft_type: str
    has_head: bool


KINDS: dict[Task, TaskKind] = {
    "classification": TaskKind("AutoModelForSequenceClassification", "SEQ_CLS", True),
    "causal-lm": TaskKind("AutoModelForCausalLM", "CAUSAL_LM", False),
}
