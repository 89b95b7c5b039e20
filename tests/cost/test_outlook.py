"""What fits a card, from a configuration alone."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import rankpilot
import transformers as t
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.common.text import format_bytes
from rankpilot.cost.cards import card_rates, find_device_spec
from rankpilot.cost.forecast.allocator import replay
from rankpilot.cost.forecast.card_use import UNDER
from rankpilot.cost.forecast.configured_step import REDUCE_BUCKET_BYTES, Shards
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.cost.forecast.what_else import brought_by_offloading, least_use, with_smaller_evaluation
from rankpilot.cost.step_config import StepConfig
from rankpilot.report.memory import configuration_text, verdict_text
from rankpilot.report.moments import too_large_evaluation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LAYERS = 4

ENCODER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER["vocab_size"] = 64
LLAMA = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}


@cache
def llama(card: str) -> Outlook:
    """What `memory_of` says of a card with so much memory; the step is that of all such cards."""
    if card == "24GiB":
        return memory_of(t.LlamaConfig(**LLAMA), card, rank=8, batch_size=8, max_length=1024)
    first = llama("24GiB")
    outlook = Outlook(first._free, first.rank, first.settings, card=find_device_spec(card), dtype=first.dtype)
    outlook._lean = first._lean
    return outlook


def card_with(room: float) -> str:
    """A card that leaves a step so many MiB beside the frozen model, the context and workspaces."""
    wide = llama("24GiB")
    return f"{wide.room.taken / 2**20 + room:.0f}MiB"


def test_a_wide_card_takes_all_layers_without_checkpointing() -> None:
    outlook = llama("24GiB")
    best = outlook.as_asked
    assert best is not None
    assert (best.layers, best.checkpointed, best.use.verdict) == (LAYERS, (), "fits")
    assert best.use.spare_bytes > 0.9 * outlook.room.bytes
    assert outlook.breakdown(best).total == pytest.approx(best.step_bytes, rel=2e-4)
    assert {choice.rank for choice in outlook.choices} == {1, 8, 16, 64}
    assert all(cell.checkpointed == 0 for cell in outlook.grid if cell.shape.rows * cell.shape.length <= 8192)


@pytest.mark.parametrize(
    ("given", "continues", "positions", "sizes"),
    [
        ({}, True, None, (2, 8, 1024)),
        ({}, True, 512, (2, 8, 512)),
        ({"batch_size": 4}, True, None, (4, 1, 1024)),
        ({"accumulation": 3, "max_length": 7}, True, 512, (2, 3, 7)),
        ({}, False, 512, (16, 1, 64)),
    ],
)
def test_usual_sizes(given: dict[str, int], continues: bool, positions: int | None, sizes: tuple[int, ...]) -> None:
    step = StepConfig(**given).sized(continues=continues, positions=positions)
    assert (step.batch_size, step.accumulation, step.max_length) == sizes


def test_several_gpus_share_what_their_scheme_shares() -> None:
    step, plan = llama("24GiB")._free, llama("24GiB").plan(LAYERS, 8)
    decoder = LlamaDecoderLayer(t.LlamaConfig(**LLAMA), 0)
    whole, layer = step.model.frozen_bytes, 2 * sum(parameter.numel() for parameter in decoder.parameters())
    outside = whole - LAYERS * layer
    trained = sum(rank * (target.d_in + target.d_out) for rank, target in zip(plan.tolist(), step.targets, strict=True))
    ddp, fsdp, zero = (Shards(4, sharding).of(step) for sharding in ("ddp", "fsdp2", "zero3"))
    peak, of_ddp, of_fsdp = (each.memory.with_checkpointed(()).peak(plan) for each in (step, ddp, fsdp))
    assert Shards().of(step) is step
    assert fsdp.saved[-1].again_bytes == fsdp.memory.peak(plan) != step.memory.peak(plan)
    two = Shards(4, "zero2").of(step)
    assert two.model.frozen == (*ddp.model.frozen, REDUCE_BUCKET_BYTES)
    both = step.memory.states.optimizer + step.memory.states.weights
    np.testing.assert_array_equal(two.memory.states.optimizer, np.ceil(both / 4))
    assert ddp.model.frozen_bytes == whole
    assert of_ddp - peak == 4 * trained  # its buckets, of fp32
    assert 0 <= fsdp.model.frozen_bytes - whole / 4 < 100  # rounded up by tensor
    assert outside / 4 < of_fsdp - peak + 0.75 * 3 * 4 * trained < 2 * layer + outside  # what is gathered at the peak
    replayed = [replay(each.memory.with_checkpointed(()), plan, []).allocated for each in (step, fsdp)]
    assert replayed[0] - replayed[1] == pytest.approx(peak - of_fsdp, abs=0.01 * peak), "on a card"
    gathered = zero.model.frozen_bytes - 2 * step.model.products[1] ** 2
    assert 0 <= gathered - 1.25 * whole < 100  # a model below a billion parameters is gathered whole


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"gpus": 0}, "gpus must be a whole number from 1"),
        ({"sharding": "fsdp2"}, "sharding fsdp2 needs several GPUs: set gpus"),
        ({"gpus": 2, "sharding": "tp"}, "sharding must be one of ddp, zero2, fsdp2, zero3; got 'tp'"),
    ],
)
def test_shards_that_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        memory_of(t.LlamaConfig(**LLAMA), "24GiB", **given)


def test_the_time_is_that_of_the_rows_that_were_asked_for() -> None:
    """A row takes less of the time of plain LoRA's fixed work than four do; a calibration has four at least."""
    config = t.LlamaConfig(**LLAMA | {"num_hidden_layers": 1})
    flops = [float(memory_of(config, "24GiB", batch_size=rows, max_length=64).step.work.flops.sum()) for rows in (1, 4)]
    assert 3 < flops[1] / flops[0] < 4.01


def test_a_narrow_card_checkpoints_some_layers() -> None:
    wide = llama("24GiB")
    none, every = wide.choice(LAYERS, 8, ()), wide.choice(LAYERS, 8, wide.checkpointable)
    middle = (none.use.total_bytes + every.use.total_bytes) / 2
    outlook = llama(f"{middle / 2**20:.0f}MiB")
    best = outlook.as_asked
    assert best is not None
    assert best.layers == LAYERS
    assert 0 < len(best.checkpointed) < LAYERS
    assert best.use.total_bytes <= outlook.card.memory_bytes < none.use.total_bytes
    fewer = outlook.choice(LAYERS, 8, best.checkpointed[:-1])
    assert fewer.use.verdict != "fits", "one layer less is too much"
    (asked,) = (cell for cell in outlook.grid if cell.shape == outlook.memory.shape)
    assert asked.checkpointed == len(best.checkpointed), "the table of batches says the same"


def test_less_room_than_the_error_may_not_fit_and_the_status_is_that_of_what_fits() -> None:
    wide = llama("24GiB")
    least = wide.choice(LAYERS, 8, wide.checkpointable).use.total_bytes
    outlook = llama(f"{least / 2**20 + 2:.0f}MiB")
    best = outlook.as_asked
    assert best is not None
    assert best.verdict == "may not fit"
    assert 0 <= best.use.spare_bytes < UNDER["none"] * outlook.card.memory_bytes
    told = verdict_text(outlook)
    assert told.startswith("May not fit: ")
    assert format_bytes(UNDER["none"] * outlook.card.memory_bytes) in told
    budget = re.search(r"budget='(\d+)MiB step'", configuration_text(outlook))
    assert budget is None or int(budget[1]) * 2**20 <= best.step_bytes + best.use.spare_bytes


@pytest.mark.parametrize(("quantization", "verdict"), [("none", "fits"), ("nf4", "may not fit")])
def test_a_quantised_model_has_to_leave_more_of_a_card(quantization: str, verdict: str) -> None:
    def ask(card: str) -> Outlook:
        settings = {"batch_size": 1, "max_length": 512, "gradient_checkpointing": True}
        return memory_of("smollm2-135m", card, quantization=quantization, **settings)

    use = ask("24GiB").choices[0].use
    assert use is not None
    assert ask(f"{use.total_bytes / 0.9 / 2**20:.0f}MiB").choices[0].verdict == verdict


def test_a_recommended_budget_fits_the_card() -> None:
    wide = llama("24GiB")
    none, every = wide.choice(LAYERS, 8, ()), wide.choice(LAYERS, 8, wide.checkpointable)
    outlook = llama(f"{(none.use.total_bytes + every.use.total_bytes) / 2**21:.0f}MiB")
    budget = int(re.search(r"budget='(\d+)MiB step'", configuration_text(outlook))[1]) * 2**20
    assert outlook.as_asked.step_bytes <= budget <= outlook.as_asked.step_bytes + outlook.as_asked.use.spare_bytes


def test_what_offloading_brings_is_told_where_not_all_layers_fit() -> None:
    given: dict[str, Any] = {"card": "24GiB", "batch_size": 1}
    told = memory_of("llama-3.1-8b", max_length=12288, **given)
    assert not (told.as_asked and told.as_asked.fits)
    ranks, (spare, seconds) = told.plan(told.blocks, 8), brought_by_offloading(told) or (0.0, 0.0)
    again = memory_of("llama-3.1-8b", max_length=12288, offload=True, **given)
    assert brought_by_offloading(again) is None
    assert again.as_asked is not None
    every = again.choice(told.blocks, 8, again.checkpointable)
    assert every.use
    assert spare == every.use.spare_bytes > 0
    assert seconds == pytest.approx(2 * (told.memory.peak(ranks) - every.step_bytes) / 31.5e9)
    assert "With activation_offloading" in verdict_text(told)


def test_nothing_fits_a_card_that_the_model_fills() -> None:
    outlook = llama(card_with(1))
    assert outlook.as_asked is None
    assert {choice.use.verdict for choice in outlook.choices} <= {"does not fit", "may not fit"}
    assert least_use(outlook) == outlook.choice(LAYERS, 8, outlook.checkpointable).use.total_bytes
    assert outlook.grid[-1].checkpointed is None


def test_cells_of_the_grid_agree_with_the_byte_model() -> None:
    outlook = llama(card_with(110))
    cells = {(cell.shape.rows, cell.shape.length): cell for cell in outlook.grid}
    assert {cell.checkpointed for cell in cells.values()} >= {0, None}
    for cell in cells.values():
        if cell.checkpointed is not None:
            assert cell.bytes <= outlook.card.memory_bytes
    assert [cells[8, length].bytes for length in (512, 1024)] == sorted(cells[8, n].bytes for n in (512, 1024))
    assert max(length for _, length in cells) == 4096, "no longer than the model's positions"


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (t.BertConfig(**ENCODER, max_position_embeddings=64), 200),
        (t.RobertaConfig(**ENCODER, max_position_embeddings=66, pad_token_id=1), 65),  # two are of padding
        (t.GPT2Config(**GPT2, n_positions=64), 100),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_are_no_longer_than_the_positions(config: t.PreTrainedConfig, length: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"max_length is {length}, but the model has only 64 positions\. Lower --max-length"
    ):
        memory_of(config, "T4", max_length=length)
    outlook = memory_of(config, "T4", max_length=64, dtype="fp32")
    assert outlook.card is find_device_spec("T4")
    assert not outlook.settings.bf16
    assert outlook.as_asked is not None
    assert {cell.shape.length for cell in outlook.grid} == {64}


def test_models_without_positions_take_rows_of_any_length() -> None:
    t5 = t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    outlook = memory_of(t5, "24GiB", batch_size=1, max_length=600)
    assert outlook.step.model.positions is None
    assert max(cell.shape.length for cell in outlook.grid) == 8192
    mamba = t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8)
    assert memory_of(mamba, "24GiB", batch_size=4, max_length=16, target_modules="in_proj").step.model.positions is None


def test_a_rank_is_no_higher_than_the_widest_module() -> None:
    with pytest.raises(ConfigError, match=r"rank must be at most 64, .*; got 65\."):
        memory_of(t.BertConfig(**ENCODER), "24GiB", rank=65, max_length=32)
    narrow = memory_of(t.BertConfig(**ENCODER | {"hidden_size": 32}), "24GiB", rank=32, max_length=32)
    assert {choice.rank for choice in narrow.choices} == {1, 8, 16, 32}, "64 is what no module can have"


def test_a_model_without_checkpointing_has_an_outlook_without_it() -> None:
    outlook = memory_of(t.AlbertConfig(**ENCODER, embedding_size=16), "24GiB", batch_size=2, max_length=32)
    assert outlook.checkpointable == ()
    assert outlook.as_asked is not None
    assert [choice.checkpointed for choice in outlook.choices] == [()] * len(outlook.choices)
    assert len({(choice.layers, choice.rank) for choice in outlook.choices}) == len(outlook.choices), "each is once"
    assert {cell.checkpointed for cell in outlook.grid} == {0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (t.ViTConfig(), r"\(ViTConfig\) does not read tokens but pixel_values"),
        (t.WhisperConfig(), r"\(WhisperConfig\) does not read tokens but input_features"),
        (t.WhisperConfig(architectures=["WhisperForConditionalGeneration"]), "does not read tokens but input_features"),
    ],
    ids=["vit", "whisper", "whisper, as saved"],
)
def test_models_of_pictures_and_sound_are_refused(config: t.PreTrainedConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        memory_of(config, "24GiB")


@pytest.mark.parametrize(
    ("card", "dtype", "precision"),
    [("T4", "fp16", "fp16"), ("T4", "bf16", "fp32"), ("A100 80GB", "fp32", "fp32"), ("A100 80GB", "bf16", "bf16")],
)
def test_products_go_at_the_rate_of_their_precision(card: str, dtype: str, precision: Any) -> None:
    rates = find_device_spec(card).rates
    assert rates is not None
    assert card_rates(rates, dtype).flops == rates.flops_per_s[precision]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"card": "RTX 9999"}, UnknownNameError, "RTX 4090"),
        ({"dtype": "int3"}, UnknownNameError, "bf16"),
        ({"batch": 3}, UnknownNameError, "batch_size"),
        ({"rank": 0}, ConfigError, "rank .*at least 1"),
        ({"max_length": 1}, ConfigError, "max_length at least 2"),
        ({"model": "qwen9-8b"}, UnknownNameError, "qwen3-8b"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"model": t.LlamaConfig(**LLAMA), "card": "24GiB"} | options
    with pytest.raises(error, match=words):
        rankpilot.memory_of(given.pop("model"), given.pop("card"), **given)


@pytest.mark.parametrize("seed", range(20))
def test_an_evaluation_that_does_not_fit_is_told_with_settings_that_do(seed: int) -> None:
    drawn, wide = np.random.default_rng(seed), llama("24GiB")
    asked: dict[str, Any] = {
        "eval_batch_size": int(drawn.integers(8, 65)),
        "eval_length": int(drawn.integers(64, 2048)),
    }
    asked |= {"loss": str(drawn.choice(["model", "liger"])), "eval_packed": bool(drawn.integers(2))}
    asked |= {"keep_logits": int(drawn.integers(1, 400))} if drawn.integers(2) else {}
    least = wide.choice(LAYERS, 8, wide.checkpointable).use.total_bytes
    spec = find_device_spec(f"{1.2 * least / 2**20:.0f}MiB")

    def evaluated(**settings: Any) -> Outlook:
        step = replace(wide._free, loaded=replace(wide.given.loaded, **settings))
        outlook = Outlook(step, 8, wide.settings, card=spec, dtype=wide.dtype)
        outlook._lean = None  # not recorded again
        return outlook

    plan = wide.plan(LAYERS, 8)
    while (found := evaluated(**asked)).evaluation(wide.memory.shape).bytes(wide.memory, plan) < spec.memory_bytes:
        asked["eval_batch_size"] *= 2
    assert not (found.as_asked and found.as_asked.fits)
    other = with_smaller_evaluation(found)
    assert other.as_asked.fits
    loaded, told = other.given.loaded, too_large_evaluation(found)
    assert ("per_device_eval_batch_size" in told) == (loaded.eval_batch_size != asked["eval_batch_size"])
    fewer = any(each in told for each in ("prediction_loss_only", "eval_accumulation_steps"))
    assert fewer == (loaded.keep_logits != asked.get("keep_logits", 0))
    assert evaluated(**asked | {"eval_batch_size": "none"}).as_asked.fits
