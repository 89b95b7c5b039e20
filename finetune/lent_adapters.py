"""Adapters that a bare model has for as long as a plan for it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import UnsupportedError
from ..lora.fresh import fresh_adapters
from ..lora.ladder import REFERENCE_RANK

_TASK_TYPES = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
}
"""By a part of the name of a transformers class."""

_NEW_HEADS = ("Classification", "MultipleChoice", "QuestionAnswering")
"""In names of classes whose head is new where a fine-tune begins, and trains whole."""


@contextmanager
def lent_adapters(model: Any) -> Iterator[PeftModel]:
    """The model with fresh adapters on all its linear layers; afterwards it has none.

    Raises:
        UnsupportedError: it holds adapters already, which could not be told from these.
        ConfigError: PEFT cannot adapt it.
    """
    name = type(model).__name__
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError(
            f"{name} holds adapters already, and is no PeftModel of one kind of adapter. Pass the PeftModel that "
            "`peft.get_peft_model(model, LoraConfig(...))` returned, or the model without its adapters."
        )
    new_head, size = any(part in name for part in _NEW_HEADS), {"r": REFERENCE_RANK, "lora_alpha": 16}
    try:
        adapted = fresh_adapters(model, name, task_type(model), new_head=new_head, target_modules="all-linear", **size)
    except BaseException:
        _remove_layers(model)
        raise
    try:
        yield adapted
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)  # older versions of PEFT leave it there, and warn of it later


def task_type(model: Any) -> TaskType | None:
    """PEFT's task type of a model; None where its class tells none, or none fits what it reads."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if "ForConditionalGeneration" in name:  # translation, speech, and models that continue a text beside a picture
        if not getattr(config, "is_encoder_decoder", False):
            return TaskType.CAUSAL_LM
        return TaskType.SEQ_2_SEQ_LM if getattr(model, "main_input_name", "") == "input_ids" else None
    return next((kind for part, kind in _TASK_TYPES.items() if part in name), None)


def _remove_layers(model: nn.Module) -> None:
    """Take away the adapters of a model that PEFT began to adapt."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    vars(model).pop("peft_config", None)
