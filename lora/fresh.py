"""Fresh LoRA adapters on a transformers model, and the head that trains beside them."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, UnknownNameError


def fresh_adapters(
    base: PreTrainedModel, name: str, peft_type: str | None, *, new_head: bool, target_modules: str, **options: Any
) -> PeftModel:
    """The model with fresh LoRA adapters.

    Args:
        base: the model.
        name: the model's name, for errors.
        peft_type: PEFT's `task_type`; None for none.
        new_head: whether the model's head is new, and trains whole.
        target_modules: "all-linear" or names separated by commas.
        options: further arguments of LoraConfig, such as r and lora_alpha.

    Raises:
        UnknownNameError: there is no such module.
        ConfigError: a module cannot carry an adapter.
    """
    modules = target_modules if target_modules == "all-linear" else _existing(base, target_modules)
    heads = _trained_heads(base, peft_type) if new_head else {}
    lora = LoraConfig(target_modules=modules, task_type=peft_type, **heads, **options)
    try:
        return get_peft_model(base, lora)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Cannot adapt {name!r} with target_modules={target_modules!r}: {error}") from error


_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "projector")
"""Names of heads in models whose base model is no module of the name that their class tells."""


def head_names(model: PreTrainedModel) -> list[str]:
    """The names of the modules beside the base model that hold weights, such as "classifier"."""
    with_weights = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if model.base_model_prefix in with_weights:
        return [name for name in with_weights if name != model.base_model_prefix]
    return [name for name in with_weights if name in _HEADS]


def _trained_heads(base: PreTrainedModel, peft_type: str | None) -> dict[str, Any]:
    """The arguments of LoraConfig that let new heads train whole, without adapters in them."""
    heads = head_names(base)
    # PEFT does this by itself for the usual names.
    if not heads or (peft_type == "SEQ_CLS" and set(heads) <= {"classifier", "score"}):
        return {}
    return {"modules_to_save": heads, "exclude_modules": rf"(?:{'|'.join(map(re.escape, heads))})(?:\..*)?"}


def _existing(base: PreTrainedModel, target_modules: str) -> list[str]:
    """The names in a list that is separated by commas; UnknownNameError if one is no module that can be adapted."""
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    paths = [path for path, module in base.named_modules() if isinstance(module, kinds)]
    names = [part.strip() for part in target_modules.split(",")]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            linear = [path for path in paths if not isinstance(base.get_submodule(path), nn.Embedding)]
            ends = dict.fromkeys(path.rpartition(".")[2] for path in linear)
            raise UnknownNameError.of("target module", name, ends, "all-linear takes all linear layers.")
    return names
