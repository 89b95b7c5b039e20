"""Packaged models and data, tiny, in a cache of their own: what people run is quick there without any change of it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rankpilot.common.files import CACHE_VARIABLE
from rankpilot.data.assets import ASSETS, write_manifest
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from .finetune.trainer_kinds import sizes, word_tokenizer


def _classifier(folder: Path) -> None:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**sizes(), pad_token_id=1)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def _chat_model(folder: Path) -> None:
    """A model whose logits take most of the bytes, as those of a small model do."""
    torch.manual_seed(0)
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    config = LlamaConfig(**sizes(vocab_size=2048, num_hidden_layers=4), num_key_value_heads=2, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def _reviews(file: Path) -> None:
    rows = [
        {"text": f"the number {i} comes after {j} " * (4 + 3 * (i % 4)), "label": i % 2, "source": source}
        for source in ("imdb", "rotten_tomatoes")
        for i in range(1, 41)
        for j in range(1, 51)
    ]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label", "source"])
        writer.writeheader()
        writer.writerows(rows)


_WRITERS: dict[str, Callable[[Path], None]] = {
    "all-minilm-l6-v2": _classifier,
    "smollm2-135m-instruct": _chat_model,
    "movie-reviews": _reviews,
}


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache))
        for name, write in _WRITERS.items():
            asset = ASSETS[name]
            asset.path.parent.mkdir(parents=True)
            write(asset.path)
            write_manifest(asset, asset.folder)
    return cache


@pytest.fixture(params=["small", pytest.param("real", marks=[pytest.mark.assets, pytest.mark.slow, pytest.mark.long])])
def cache(request: pytest.FixtureRequest, small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is fetched is tiny; with `make test-long`, it is also what is named."""
    if request.param == "small":
        monkeypatch.setenv(CACHE_VARIABLE, str(small_cache))
    return str(request.param)
