"""The models of the methods benchmark: packaged ones, a cut of one, and those of our own pretraining."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ...data.models import load_model, load_tokenizer
from ...env.proxies.bases import PROXY_BASES, load_base_model
from .tasks import MethodTask

_LOADED = {"minilm-l6": "all-minilm-l6-v2", "minilm-l3": "all-minilm-l6-v2", "smollm2-135m": "smollm2-135m-instruct"}
"""The packaged model behind each name."""

BASES = (*_LOADED, *(name for name in PROXY_BASES if not name.startswith("bert")))
"""Names of models: MiniLM whole and its lower three layers, SmolLM2, and the causal proxy bases, which read bytes."""


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
    if task.model == "minilm-l3":
        encoder: Any = model.bert.encoder
        encoder.layer = encoder.layer[:3]
        model.config.num_hidden_layers = 3
    return model.float().train()
