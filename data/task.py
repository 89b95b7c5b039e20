"""Fine-tuning tasks, for settings used before any library is loaded."""

from typing import Literal, NamedTuple

Task = Literal["classification", "causal-lm"]


ELSE = "For other tasks, call rankpilot.attach on your own Trainer."
"""Hint of errors on data for other tasks."""


class TaskKind(NamedTuple):
    """Library names of a task.

    Attributes:
        auto_class: class of transformers to load a model with the matching head.
        peft_type: PEFT's `task_type`.
    """

    auto_class: str
    peft_type: str


KINDS: dict[Task, TaskKind] = {
    "classification": TaskKind("AutoModelForSequenceClassification", "SEQ_CLS"),
    "causal-lm": TaskKind("AutoModelForCausalLM", "CAUSAL_LM"),
}
