"""Target modules: which are found, in which order, and which are refused."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import variants
from rankpilot.errors import ConfigError, UnknownNameError, UnsupportedError
from rankpilot.lora.targets import check_ranks, find_target_modules, other_trainable, unwrap
from transformers import LlamaForCausalLM


def test_every_linear_layer_of_llama_is_a_target_in_forward_order(make_llama):
    targets = find_target_modules(make_llama())
    assert [t.name.rpartition(".")[2] for t in targets[:7]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert [t.block for t in targets] == [0] * 7 + [1] * 7
    key = targets[1]
    assert key.name == "model.layers.0.self_attn.k_proj"
    assert (key.d_in, key.d_out, key.rank, key.max_rank, key.scaling) == (32, 16, 4, 16, 2.0)
    assert key.weight_a.shape == (4, 32)
    assert key.weight_b.shape == (16, 4)


def test_blocks_number_the_layers_of_bert(make_bert):
    targets = find_target_modules(make_bert())
    assert len(targets) == 18
    assert [t.block for t in targets] == [0] * 6 + [1] * 6 + [2] * 6


def test_wrapped_models_are_unwrapped(make_llama):
    model = make_llama()
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert unwrap(wrapper) is model
    assert len(find_target_modules(wrapper)) == 14
    outer = torch.nn.Module()
    outer._orig_mod = wrapper
    assert unwrap(outer) is model


def test_only_the_active_adapter_is_found(make_llama):
    model = make_llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(find_target_modules(model)) == 14
    model.set_adapter("second")
    second = find_target_modules(model)
    assert [t.name for t in second] == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert {t.rank for t in second} == {2}


def test_an_adapter_that_was_deleted_is_told(make_llama):
    model = make_llama()
    model.delete_adapter("default")
    with pytest.raises(UnknownNameError, match="Unknown adapter 'default'"):
        find_target_modules(model)


def test_a_model_without_peft_is_refused_with_the_way_out(llama_config):
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM is not a PEFT model.*get_peft_model"):
        find_target_modules(LlamaForCausalLM(llama_config))


def test_another_peft_method_is_refused(llama_config):
    model = get_peft_model(LlamaForCausalLM(llama_config), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="no LoRA target module"):
        find_target_modules(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the frozen weights"),
        pytest.param(
            {"init_lora_weights": "mica"},
            "MiCALinearVariant cannot change rank",
            marks=pytest.mark.skipif(not hasattr(variants, "MiCALinearVariant"), reason="of later versions of PEFT"),
        ),
    ],
)
def test_pairs_whose_rank_cannot_change_are_refused(make_llama, options, reason):
    with pytest.raises(UnsupportedError, match=reason):
        find_target_modules(make_llama(**options))


def test_check_ranks_names_what_is_wrong(make_llama):
    targets = find_target_modules(make_llama())
    check_ranks(targets, {targets[1].name: 16, targets[0].name: 0})
    with pytest.raises(UnknownNameError, match=r"Did you mean: 'model\.layers\.0\.self_attn\.q_proj'"):
        check_ranks(targets, {"model.layers.0.self_attn.q_prj": 4})
    with pytest.raises(ConfigError, match="Rank -1"):
        check_ranks(targets, {targets[1].name: -1})


def test_what_trains_beside_the_pairs(make_bert, make_llama):
    model = make_bert()
    rest = other_trainable(model, find_target_modules(model))
    assert sorted(p.numel() for p in rest) == [3, 96]
    llama = make_llama()
    assert other_trainable(llama, find_target_modules(llama)) == []
