"""Configurations by name: the table's sizes are the published ones, and mistakes are one line."""

from __future__ import annotations

import json
import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from huggingface_hub import constants
from rankpilot.common.errors import AssetError, ConfigError, UnknownNameError
from rankpilot.cost.forecast import published
from rankpilot.cost.forecast.from_config import base_on_meta, usual_class
from rankpilot.cost.forecast.known_models import published_models, short_name
from rankpilot.cost.forecast.published import find_configuration, try_hub_once
from transformers import AutoConfig, LlamaConfig


def test_models_of_the_table_have_their_published_number_of_parameters():
    found = {}
    for name in published_models():
        config = find_configuration(name)
        auto_class = usual_class(config)
        with torch.device("meta"):
            if auto_class == "AutoModelForSequenceClassification":  # counted without a head
                model = transformers.AutoModel.from_config(config)
            else:
                model = base_on_meta(config, auto_class)
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    assert found == {name: model["parameters"] for name, model in published_models().items()}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("microsoft/Phi-3.5-mini-instruct", "phi-3.5-mini"),
        ("google/flan-t5-xl", "flan-t5-xl"),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2"),
        ("google/gemma-4-E4B-it", "gemma-4-e4b"),
        ("QWEN3-8B", "qwen3-8b"),
    ],
)
def test_ids_of_the_hub_are_found_in_the_table(name, short):
    assert find_configuration(name).to_dict() == find_configuration(short).to_dict()


def test_a_folder_and_its_file_are_read(tmp_path):
    config = LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        assert find_configuration(str(place)).vocab_size == 96
    LlamaConfig(vocab_size=97).to_json_file(tmp_path / "other.json")
    assert find_configuration(str(tmp_path / "other.json")).vocab_size == 97


def test_a_t5_whose_file_says_that_it_is_not_tied_has_an_output_layer(tmp_path):
    fields = AutoConfig.for_model("t5", d_model=16, vocab_size=64).to_dict() | {"tie_word_embeddings": False}
    del fields["scale_decoder_outputs"]  # older files do not have it
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = base_on_meta(find_configuration(str(tmp_path)), "AutoModelForSeq2SeqLM")
    assert base.lm_head.weight is not base.shared.weight is base.decoder.embed_tokens.weight


def unreachable(place: Any, **options: Any) -> Any:
    raise OSError(f"We couldn't connect to reach {place}.\nSecond line.")


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match=r"Unknown model 'lama-3.1-8b'. Did you mean: 'llama-3.1-8b'"):
        find_configuration("lama-3.1-8b")
    with pytest.raises(AssetError, match=r"No configuration found at .*nowhere"):
        find_configuration(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match=r"is not usable: .*unheard-of"):
        find_configuration(str(tmp_path))
    odd = {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    with pytest.raises(ConfigError, match=r"is not usable: The hidden size \(30\) is not a multiple") as error:
        find_configuration(str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", unreachable)
    with pytest.raises(
        AssetError, match=r"Cannot read the configuration of 'someone/Qwen3-8B': .*couldn't connect.*network"
    ) as error:
        find_configuration("someone/Qwen3-8B")
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Its client would sleep between its tries; afterwards it opens no connection at all."""
    session = Mock()
    session.head.side_effect = ConnectionError("no network")
    monkeypatch.setattr(published, "get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", Mock(side_effect=AssertionError("no second try")))
    try_hub_once.cache_clear()
    try:
        for name in ("nobody/nothing", "nobody/else"):
            with pytest.raises(AssetError, match=r"Cannot read the configuration of .*couldn't connect"):
                find_configuration(name)
        assert session.head.call_count == 1
    finally:
        try_hub_once.cache_clear()


def test_an_id_and_its_copies_are_the_model_that_they_name() -> None:
    table = published_models()
    for name, entry in table.items():
        owner, _, own = entry["id"].partition("/")
        assert short_name(entry["id"]) == short_name(entry["id"].lower()) == name
        assert short_name(f"{owner}/{name}") == name
        assert "/" not in own
    assert len({entry["id"].lower() for entry in table.values()}) == len(table)
