"""Frozen models in four or eight bits for each weight, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..common.devices import find_device
from ..lora.fresh import head_names
from ..lora.frozen_weights import guard_base
from ..memory.step_config import Quantization
from .task import KINDS, Task


def bitsandbytes_settings(config: Any, task: Task, quantization: Quantization) -> dict[str, Any]:
    """The settings of `BitsAndBytesConfig` for a model, as JSON values; none without quantisation.

    A head that trains stays as it is. Otherwise transformers chooses what does, such as the output layer.

    Args:
        config: the model's configuration.
        task: decides the head.
        quantization: how weights are stored.
    """
    if quantization == "none":
        return {}
    kept = _head_names(config, task) if KINDS[task].has_head else None
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return settings | {"llm_int8_skip_modules": kept}


def _head_names(config: Any, task: Task) -> list[str]:
    """The names of the modules beside the base model, from a model without weights."""
    with torch.device("meta"):
        model = getattr(transformers, KINDS[task].auto_class).from_config(config)
    return head_names(model)


def loading_options(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` for settings of `bitsandbytes_settings`, on the device of this machine."""
    if not settings:
        return {}
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": find_device()}}


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Make a quantised model fit for training: what is not quantised in fp32, and no repacking on the CPU.

    Gradient checkpointing stays off, since it is a choice of its own.
    """
    guard_base(model)
    prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return prepared
