"""What trainers run in place of transformers' own code, and how they keep experts: bytes of it."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.cost.forecast.allocator import CachingAllocator, replay
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import base_on_meta, from_config
from rankpilot.cost.record import kernels_on_meta
from rankpilot.cost.record.model_states import frozen_bytes
from rankpilot.cost.record.quantised import quantise
from rankpilot.cost.step_config import StepConfig

from .test_from_config import STEP, largest_price_error, real_memory

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA = t.LlamaConfig(**_SIZES, dtype="bfloat16")
MIXTRAL = t.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, dtype="bfloat16")
GPT_OSS = t.GptOssConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=64, dtype="bfloat16")
APERTUS = t.ApertusConfig(**{**_SIZES, "intermediate_size": 512}, dtype="bfloat16")


def step_of(config: t.PreTrainedConfig, settings: dict[str, Any] | None = None, **loaded: Any) -> ConfiguredStep:
    step = StepConfig(**{"batch_size": 1, "max_length": 256, "exact_savers": False, "bf16": True} | (settings or {}))
    return from_config(config, step, LoadedAs(**loaded))


def peak(config: t.PreTrainedConfig, settings: dict[str, Any] | None = None, **loaded: Any) -> float:
    step = step_of(config, settings, **loaded)
    return step.memory.peak(np.full(len(step.targets), 4))


@pytest.mark.parametrize("implementation", ["flash", "flex"])
def test_scores_of_sinks_grow_with_the_square_and_a_kernel_has_none(implementation):
    def growth(**loaded: Any) -> float:
        return peak(GPT_OSS, {"max_length": 2048}, **loaded) / peak(GPT_OSS, {"max_length": 1024}, **loaded)

    assert growth(implementation="eager") > 3
    assert growth(implementation=implementation) < 2.1


def test_attention_by_a_kernel_takes_what_torchs_function_takes():
    assert peak(LLAMA, implementation="flash") == pytest.approx(peak(LLAMA, implementation="sdpa"), rel=0.01)


def test_losses_without_logits_take_less_and_one_in_tiles_a_tile_more():
    words = t.LlamaConfig(**{**_SIZES, "vocab_size": 60_000}, dtype="bfloat16")
    settings = {"gradient_checkpointing": True}
    whole, chunked, cut = (peak(words, settings, loss=loss) for loss in ("model", "chunked", "cut"))
    assert chunked - cut == pytest.approx(256 * 32_768 * 2, rel=0.2)
    assert whole - cut > 256 * 60_000 * 8


def test_a_fused_activation_holds_its_input_alone():
    plain, fused = peak(APERTUS, fused_activations=False), peak(APERTUS)
    assert plain - fused > 2 * 5 * 256 * 512 * 2  # five tensors of half precision in each of two layers, at least


def test_inputs_of_checkpointed_layers_lie_in_main_memory():
    deep = t.LlamaConfig(**{**_SIZES, "num_hidden_layers": 24}, dtype="bfloat16")
    settings = {"gradient_checkpointing": True, "max_length": 512}
    plain, offloaded = peak(deep, settings, loss="cut"), peak(deep, settings, loss="cut", offload=True)
    assert 0.7 * (24 - 5) * 512 * 64 * 2 < plain - offloaded <= 1.01 * (24 - 5) * 512 * 64 * 2  # the peak moves


def test_packed_rows_may_be_longer_than_positions():
    short = t.LlamaConfig(**_SIZES, max_position_embeddings=128)
    with pytest.raises(ConfigError, match="128 positions"):
        step_of(short)
    assert step_of(short, packed=True).memory.shape.length == 256


def test_adam_in_four_bits_takes_half_of_eight():
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    wide = t.LlamaConfig(**_SIZES | {"hidden_size": 2048, "intermediate_size": 4096}, dtype="bfloat16")
    eight, four = (
        step_of(wide, {"optimizer": name}).memory.states.optimizer.sum() for name in ("adamw8bit", "adamw4bit")
    )
    assert 0.4 < four / eight < 0.65


# Experts -----------------------------------------------------------------------------------------------------------


def test_experts_stay_in_16_bits_where_nothing_quantises_them():
    pytest.importorskip("bitsandbytes")
    experts = 2 * 4 * 3 * 64 * 64
    frozen = {
        (kept, prepare): step_of(
            MIXTRAL, {"quantization": "nf4", "prepare_kbit": prepare}, experts=kept
        ).model.frozen_bytes
        for kept in ("transformers", "axolotl", "unsloth")
        for prepare in (False, True)
    }
    assert frozen["transformers", False] - frozen["axolotl", False] == pytest.approx(1.484 * experts, rel=0.04)
    assert frozen["axolotl", False] == frozen["unsloth", False]
    others = frozen["axolotl", True] - frozen["axolotl", False]
    assert frozen["transformers", True] - frozen["transformers", False] == others, "experts were cast to fp32"


def test_experts_one_by_one_take_less_at_the_peak_than_all_of_a_layer():
    pytest.importorskip("bitsandbytes")
    settings = {"quantization": "nf4", "prepare_kbit": False, "gradient_checkpointing": True}
    wide = t.MixtralConfig(**{**_SIZES, "intermediate_size": 1024}, num_local_experts=4, dtype="bfloat16")
    whole, single = (peak(wide, settings, experts=kept, loss="cut") for kept in ("axolotl", "unsloth"))
    assert whole - single == pytest.approx(3 * 3 * 64 * 1024 * 2, rel=0.35)


def test_experts_of_a_real_layer_take_the_predicted_bytes():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    config = copy.deepcopy(MIXTRAL)
    torch.manual_seed(0)
    base = base_on_meta(config, "AutoModelForCausalLM", torch.bfloat16)  # here on the CPU
    plain = frozen_bytes(base.requires_grad_(False))
    for layer in base.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True)
    step = StepConfig(**STEP, target_modules="q_proj,v_proj", exact_savers=False)
    loaded = LoadedAs(device="cpu", dtype=torch.bfloat16)
    memory, model, _ = real_memory(MIXTRAL, step, loaded, base.requires_grad_(False))
    quantised = StepConfig(
        **STEP, target_modules="q_proj,v_proj", exact_savers=False, quantization="nf4", prepare_kbit=False
    )
    with pytest.MonkeyPatch.context() as patch:  # linear layers stay as they are in the real one
        patch.setattr("rankpilot.cost.record.quantised.should_convert_module", lambda *_: False)
        hollow = from_config(MIXTRAL, quantised, LoadedAs(device="cpu", dtype=torch.bfloat16, experts="axolotl"))
    assert frozen_bytes(model) < plain
    assert hollow.model.frozen_bytes == frozen_bytes(model)
    assert largest_price_error(hollow.memory, memory) < 0.02


def test_each_adapter_of_quantised_experts_has_a_gradient():
    pytest.importorskip("bitsandbytes")
    step = step_of(
        MIXTRAL, {"quantization": "nf4", "prepare_kbit": False, "target_parameters": "all-experts"}, experts="axolotl"
    )
    adapted = [number for number, target in enumerate(step.targets) if target.experts > 1]
    assert len(adapted) == 4
    assert set(adapted) < set(step.memory.recording.gradients.values())


def test_layers_that_read_weights_past_the_quantised_ones_stay_as_they_are():
    pytest.importorskip("bitsandbytes")
    sizes = {"num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2}
    with torch.device("meta"):
        jamba = base_on_meta(t.JambaConfig(**_SIZES, **sizes, dtype="bfloat16"), "AutoModelForCausalLM")
        quantise(jamba, "nf4")
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in jamba.named_modules()}
    assert (kinds["dt_proj"], kinds["q_proj"]) == ("Linear", "Linear4bit")


def test_a_scan_saves_its_inputs_and_not_the_states_of_all_tokens():
    """What mamba-ssm's `SelectiveScanFn` saves: its inputs, the ungated result and two states per 2,048 tokens."""
    mamba = t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    steps = [step_of(mamba, {"max_length": length}) for length in (128, 256)]
    assert len({len(step.memory.recording.sizes) for step in steps}) == 1, "no loop over tokens"
    assert vars(sys.modules[t.MambaForCausalLM.__module__])[kernels_on_meta.SCAN] is not kernels_on_meta._scan
    rows, width, states, tokens = 2, 8, 4, 3000
    shapes = [(rows, width, tokens)] * 2 + [(width, states)] + [(rows, states, tokens)] * 2
    inputs = [torch.zeros(shape, dtype=torch.bfloat16).float().requires_grad_() for shape in shapes]
    more = {"D": torch.zeros(width), "z": torch.zeros(rows, width, tokens).requires_grad_(), "delta_bias": None}
    saved: dict[int, int] = {}
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.update({each.data_ptr(): each.nbytes}) or each, lambda each: each
    )
    with keep:
        result = kernels_on_meta._scan(*inputs, **more)
    given = sum(each.nbytes for each in [*inputs, more["D"], more["z"]])
    assert sum(saved.values()) == given + result.nbytes + 4 * rows * width * 2 * 2 * states
    assert result.shape == (rows, width, tokens)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_context_keeps_goes_with_the_second_run(reentrant):
    pytest.importorskip("bitsandbytes")
    deep = t.LlamaConfig(**{**_SIZES, "num_hidden_layers": 8}, dtype="bfloat16")
    step = step_of(deep, {"quantization": "int8", "gradient_checkpointing": True}, reentrant=reentrant)
    ranks, memory = np.full(len(step.targets), 4), step.memory
    replayed = replay(memory, ranks, step.model.frozen).allocated - step.model.frozen_bytes
    assert replayed <= 1.05 * memory.peak(ranks)


# Target modules ----------------------------------------------------------------------------------------------------


def test_targets_that_a_model_lacks_are_left_out_as_peft_does():
    named = step_of(APERTUS, {"target_modules": "gate_proj,up_proj"})
    assert {target.name.rpartition(".")[2] for target in named.targets} == {"up_proj"}
    with pytest.raises(UnknownNameError, match="Unknown target module"):
        step_of(APERTUS, {"target_modules": "gate_proj,gate"})


def test_targets_by_a_regular_expression():
    step = step_of(LLAMA, {"target_modules": r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj"})
    assert len(step.targets) == 4
    with pytest.raises(ConfigError, match="matches no linear layer"):
        step_of(LLAMA, {"target_modules": r"layers.[\d]+.q_proj"})
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        step_of(LLAMA, {"target_modules": "(q_proj"})


# The allocator -----------------------------------------------------------------------------------------------------


def test_an_expandable_segment_holds_hardly_more_than_what_is_allocated():
    generator = np.random.default_rng(0)
    plain, expandable = CachingAllocator(), CachingAllocator(expandable=True)
    for allocator in (plain, expandable):
        generator, held = np.random.default_rng(0), []
        for _ in range(300):
            held.append(allocator.allocate(int(generator.integers(1, 30 * 2**20))))
            if len(held) > 20:
                allocator.free(held.pop(int(generator.integers(len(held)))))
    assert plain.peak_allocated == pytest.approx(expandable.peak_allocated, rel=0.01)
    assert expandable.peak_allocated <= expandable.peak_reserved < plain.peak_reserved
