"""The models of the methods benchmark: packaged ones, a cut of one, and those of our own pretraining."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ...data.models import load_model, load_tokenizer
from ...env.proxies.bases import load_base_model
from .tasks import MethodTask

_LOADED = {
    "minilm-l6": "all-minilm-l6-v2",
    "minilm-l3": "all-minilm-l6-v2",
    "smollm2-135m": "smollm2-135m-instruct",
    "smollm2-8": "smollm2-135m-instruct",
}
"""The packaged model behind each name."""

_CUT = {"minilm-l3": 3, "smollm2-8": 8}
"""How many of its lower layers are kept, where not all are."""


def reads_bytes(model: str) -> bool:
    """Whether a model reads bytes and has no tokenizer."""
    return model not in _LOADED


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model that has one."""
    return load_tokenizer(_LOADED[model])


def new_base(task: MethodTask, labels: tuple[str, ...], seed: int) -> PreTrainedModel:
    """The model without adapters, in training mode.

    Args:
        task: decides the model and its head.
        labels: names of the classes; one for regression, none for texts.
        seed: of a new head.
    """
    if reads_bytes(task.model):
        return load_base_model(task.model).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(_LOADED[task.model], task.kind, labels, tokenizer_of(task.model))
    if task.model in _CUT:
        _keep_layers(model, _CUT[task.model])
    return model.float().train()


def _keep_layers(model: PreTrainedModel, count: int) -> None:
    """Keep so many of the lower layers."""
    body: Any = model.base_model
    holder, name = (body.encoder, "layer") if hasattr(body, "encoder") else (body, "layers")
    setattr(holder, name, getattr(holder, name)[:count])
    model.config.num_hidden_layers = count
