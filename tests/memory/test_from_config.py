"""Training steps from configurations alone, beside the same steps with contents."""

from __future__ import annotations

import pytest
import torch
from rankpilot.memory.step_config import StepConfig
from transformers import LlamaConfig

from .hollow.real import largest_error

LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
STEP = {"batch_size": 4, "max_length": 24}

FORMS = {
    "plain": ({}, {}),
    "checkpointed": ({"checkpointing": True}, {}),
    "reentrant": ({"checkpointing": True}, {"reentrant": True}),
    "dora": ({}, {"adapter": {"use_dora": True}}),
    "autocast": ({"bf16": True}, {}),
    "bf16": ({}, {"dtype": torch.bfloat16}),
    "padded": ({}, {"padded": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_prices_of_a_llama_from_its_configuration_are_those_of_the_real_one(form):
    step, loaded = FORMS[form]
    assert largest_error(LLAMA, StepConfig(**STEP | step), **loaded) == 0
