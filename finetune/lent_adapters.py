"""Adapters that a bare model has for as long as a plan for it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

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
def lent_adapters(model: nn.Module) -> Iterator[PeftModel]:
    """The model with fresh adapters on all its linear layers; afterwards it has the modules that it had.

    Args:
        model: without adapters.

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
    new_head = isinstance(model, PreTrainedModel) and any(part in name for part in _NEW_HEADS)
    modules, size = dict(model.named_modules(remove_duplicate=False)), {"r": REFERENCE_RANK, "lora_alpha": 16}
    try:
        yield fresh_adapters(model, name, task_type(model), new_head=new_head, target_modules="all-linear", **size)
    finally:
        _put_back(model, modules)


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type of a model, by its class; None where it tells none, or where the model reads something else.

    Args:
        model: of transformers, or any other.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if "ForConditionalGeneration" in name:  # translation, speech, and models that continue a text beside a picture
        if getattr(model, "main_input_name", "") != "input_ids":
            return None
        return TaskType.SEQ_2_SEQ_LM if getattr(config, "is_encoder_decoder", False) else TaskType.CAUSAL_LM
    return next((kind for part, kind in _TASK_TYPES.items() if part in name), None)


def _put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give a model the modules that it had, by path; those that hold others come before them."""
    for path, module in modules.items():
        if path and model.get_submodule(path) is not module:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
    vars(model).pop("peft_config", None)  # PEFT leaves it there where it fails, and warns of it later
