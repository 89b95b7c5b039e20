"""Folders of tiny models with their tokenizers, in place of those that examples and pages name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from .finetune.trainer_kinds import llama, sizes, word_tokenizer

CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The chat model of the README and the pages."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny classifier with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**sizes(), pad_token_id=1)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny chat model with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def smaller(code: str, chat_model: Path) -> str:
    """The code of a page as it runs in a test: with fewer steps, on a CPU, and with a tiny chat model."""
    code = code.replace("max_steps=100", "max_steps=6").replace("per_device_train_batch_size=16", "use_cpu=True")
    for model in (CHAT_MODEL, "meta-llama/Llama-3.1-8B"):
        code = code.replace(model, str(chat_model))
    code = code.replace("max_length=48", "max_length=16").replace("gradient_accumulation_steps=8,", "")
    code = code.replace("bf16=True", "use_cpu=True")
    code = code.replace('budget="40%"', 'budget="100%"')  # so little holds no step of so small a model
    code = code.replace("total_steps=100", "total_steps=6").replace("islice(loader, 100)", "islice(loader, 6)")
    small = f'memory_of("{chat_model}", "RTX 4090", max_length=64'
    return code.replace('memory_of("qwen3-8b", "RTX 4090"', small)
