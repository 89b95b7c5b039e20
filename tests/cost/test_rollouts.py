"""Generation beside training: caches as transformers makes them, and the shares and lengths that fit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as t
from rankpilot.common.errors import ConfigError
from rankpilot.cost.cards import find_device_spec
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.cost.forecast.what_else import largest_share, longest_rows
from rankpilot.cost.rollouts import Engine, EngineNeeds, Rollouts, cache_bytes_of
from rankpilot.report.memory import verdict_text
from rankpilot.report.moments import moments_of
from rankpilot.report.rollouts import engine_figures

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
LLAMA = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (t.LlamaForCausalLM, t.LlamaConfig(**GROUPED)),
        (t.Qwen3ForCausalLM, t.Qwen3Config(**GROUPED, head_dim=32)),
        (t.GemmaForCausalLM, t.GemmaConfig(**GROUPED, head_dim=32)),
        (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=64, n_embd=64, n_layer=3, n_head=4)),
        (t.OPTForCausalLM, t.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=64)),
    ],
)
def test_the_cache_of_a_token_is_that_of_transformers(kind: Any, config: Any) -> None:
    model = kind(config).eval()
    with torch.no_grad():
        found = model(input_ids=torch.ones(2, 7, dtype=torch.long), use_cache=True).past_key_values
    tensors = [tensor for layer in found.layers for tensor in (layer.keys, layer.values)]
    assert cache_bytes_of(config.to_dict()) == sum(each.numel() for each in tensors) * 2 / (2 * 7)


def test_latent_attention_keeps_one_vector_per_layer() -> None:
    assert cache_bytes_of({"num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64}) == 2 * 2 * 576


@pytest.mark.parametrize("share", [0.0, -0.1, 1.2])
def test_an_engine_has_a_share_of_the_card(share: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        Engine(share)


@cache
def trained() -> Outlook:
    return memory_of(t.LlamaConfig(**LLAMA), "4GiB", batch_size=8, max_length=512, gradient_checkpointing=True)


def beside(engine: Engine | None, rows: int = 16, length: int = 0) -> Outlook:
    first = trained()
    loaded = replace(first.given.loaded, rollouts=Rollouts(rows, engine, length))
    return Outlook(replace(first.given, loaded=loaded), 8, first.settings, card=find_device_spec("4GiB"))


@pytest.mark.parametrize("sleeps", [False, True])
def test_the_largest_share_is_the_one_that_still_fits(sleeps: bool) -> None:
    highest = largest_share(beside(Engine(0.3, sleeps)), Engine(0.3, sleeps))
    assert 0.3 < highest < 1
    assert beside(Engine(highest - 0.01, sleeps)).as_asked is not None
    assert beside(Engine(highest - 0.01, sleeps)).as_asked.fits
    above = beside(Engine(min(highest + 0.02, 1.0), sleeps)).as_asked
    assert above is None or not above.fits


def test_a_sleeping_engine_leaves_room_for_longer_rows() -> None:
    found = [beside(Engine(0.5, sleeps)) for sleeps in (False, True)]
    awake, asleep = (longest_rows(each, each.given.loaded.engine, each.engine_needs) for each in found)
    assert 512 <= awake < asleep


def test_an_engine_without_room_for_its_weights_does_not_start() -> None:
    outlook = beside(Engine(0.005))
    assert outlook.engine_lacks > 0
    assert outlook.as_asked is None
    assert "vLLM would not start" in verdict_text(outlook)
    assert beside(Engine(0.3)).engine_lacks < 0
    assert engine_figures(outlook)["lacks"] == outlook.engine_lacks


def test_needs_are_shared_by_the_cards_of_an_engine() -> None:
    config = t.LlamaConfig(**LLAMA).to_dict()
    one, two = (EngineNeeds.of(config, 1e9, Rollouts(8, Engine(0.3, cards=cards)), 1024) for cards in (1, 2))
    assert one.total == pytest.approx(2 * two.total)
    assert one.cache == cache_bytes_of(config) * 1024


def test_transformers_keeps_a_cache_for_all_rows() -> None:
    few, many = beside(None, 8), beside(None, 20_000)
    assert few.as_asked is not None
    for outlook, tokens in ((many, 20_000 * 512), (beside(None, 20_000, 2048), 20_000 * 2048)):
        moments = {moment.name: moment.device_bytes for moment in moments_of(outlook, outlook.choices[0])}
        assert moments["generation"] - moments["checkpoint"] == tokens * cache_bytes_of(outlook.given.model.config)
    assert many.as_asked is None
