"""Mixtures of experts, latent attention, layers that keep a state, models that see: from configuration to adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot import RankPilot, TrainingRun
from rankpilot.common.errors import ConfigError, UnsupportedError
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.forecast.configured_step import LoadedAs
from rankpilot.cost.forecast.from_config import base_on_meta, from_config, usual_class
from rankpilot.cost.savers.exact import ExactSavers
from rankpilot.cost.step_config import StepConfig
from rankpilot.lora.peft_config import adapter_ranks, fresh_adapters, left_out
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader

from ..cost.measured import adamw_run
from .tiny_runs import take_step

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEAD = _TEXT | {"head_dim": 16}
_CHOSEN: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = _CHOSEN | {"num_experts": 8, "shared_expert_intermediate_size": 32}
_LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
_DEEPSEEK = _TEXT | _CHOSEN | _LATENT | {
    "num_key_value_heads": 4, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_DELTA: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_DELTA |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_hidden_layers": 4}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_SIGHT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "patch_size": 4}
_ROTARY = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

ARCHITECTURES: dict[str, tuple[type[t.PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (t.MixtralConfig, _TEXT | {"num_local_experts": 8}),
    "qwen2-moe": (t.Qwen2MoeConfig, _TEXT | _SHARED),
    "qwen3-moe": (t.Qwen3MoeConfig, _HEAD | _CHOSEN | {"num_experts": 8}),
    "qwen3-next": (t.Qwen3NextConfig, _HEAD | _SHARED | _DELTA),
    "deepseek-v2": (t.DeepseekV2Config, _DEEPSEEK),
    "deepseek-v3": (t.DeepseekV3Config, _DEEPSEEK),
    "gpt-oss": (t.GptOssConfig, _HEAD | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}),
    "granite-moe": (t.GraniteMoeConfig, _TEXT | {"num_local_experts": 8}),
    "olmoe": (t.OlmoeConfig, _TEXT | {"num_experts": 8, "num_experts_per_tok": 2}),
    "glm4-moe": (t.Glm4MoeConfig, _HEAD | _CHOSEN | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1}),
    "llama4": (t.Llama4TextConfig, _HEAD | {"num_local_experts": 4, "attention_chunk_size": 16}),
    "gemma3n": (
        t.Gemma3nTextConfig,
        _HEAD
        | {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "sliding_window": 8, "laurel_rank": 8}
        | {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16},
    ),
    "mamba2": (
        t.Mamba2Config,
        {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16}
        | {"n_groups": 2, "chunk_size": 16},
    ),
    "bamba": (t.BambaConfig, _TEXT | _MAMBA | {"mamba_chunk_size": 16, "attn_layer_indices": [1]}),
    "zamba2": (
        t.Zamba2Config,
        _TEXT
        | {"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 16, "num_mem_blocks": 1}
        | {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_key_value_heads": 4},
    ),
    "jamba": (
        t.JambaConfig,
        _TEXT | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "gemma3-vision": (
        t.Gemma3Config,
        {"text_config": _HEAD | {"sliding_window": 8}, "mm_tokens_per_image": 4}
        | {"vision_config": _SIGHT | {"num_hidden_layers": 2, "image_size": 16}},
    ),
    "qwen2.5-vl": (
        t.Qwen2_5_VLConfig,
        {"text_config": _TEXT | {"rope_parameters": _ROTARY}}
        | {"vision_config": _SIGHT | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]}},
    ),
}
OTHERS_STAND_FOR = (
    "qwen2-moe",
    "llama4",
    "mamba2",
    "deepseek-v2",
    "glm4-moe",
    "granite-moe",
    "olmoe",
    "bamba",
    "jamba",
    "gemma3-vision",
)

ROWS, LENGTH = 4, 32


def configuration(name: str, **changes: Any) -> t.PreTrainedConfig:
    kind, fields = ARCHITECTURES[name]
    return kind(**copy.deepcopy(fields) | changes)


def random_base(name: str) -> t.PreTrainedModel:
    """The model with random weights, the same at every call."""
    torch.manual_seed(0)
    config = configuration(name)
    return base_on_meta(config, usual_class(config), torch.float32)


EXPERTS = {"target_modules": "q_proj,o_proj", "target_parameters": "all-experts"}


@pytest.mark.parametrize("savers", [False, True])
@pytest.mark.parametrize("name", ["qwen3-moe", pytest.param("gpt-oss", marks=pytest.mark.long)])
def test_experts_are_priced_ranked_and_saved_as_modules_are(name: str, savers: bool, tmp_path: Path) -> None:
    model = fresh_adapters(random_base(name), name, "CAUSAL_LM", new_head=False, r=8, lora_alpha=16, **EXPERTS).train()
    targets = find_target_modules(model)
    tokens = torch.randint(5, 200, (2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    loader = DataLoader(rows, batch_size=ROWS)
    step = StepConfig(batch_size=ROWS, max_length=LENGTH, exact_savers=savers, **EXPERTS)
    cost = from_config(configuration(name), step, LoadedAs(device="cpu", dtype=torch.float32)).memory.cost()
    undo = ExactSavers(model).put_back if savers else None
    for rank in (16, 8):
        set_ranks(targets, {target.name: rank for target in targets})
        real = adamw_run(model, next(iter(loader)), fused=True).peak(np.full(len(targets), rank))
        assert plan_cost(cost, np.full(len(targets), rank)) == pytest.approx(real, rel=0.005)
    if undo:
        undo()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    pilot = RankPilot("top-down", "85%", exact_savers=savers, gradient_checkpointing=False)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=2))
    assert all(target.rank for target in targets if target.experts > 1), "a rank each is affordable"
    for batch in loader:
        take_step(pilot, optimizer, batch, lambda rows: model(**rows).loss)
    pilot.finish()
    assert all(measured <= predicted for _, predicted, measured in pilot.checks)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_base(name), tmp_path)
    with torch.no_grad():
        ours, theirs = (each.eval()(input_ids=tokens[:2]).logits for each in (model, loaded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in OTHERS_STAND_FOR)) for name in ARCHITECTURES]
)
def test_from_the_configuration_to_an_adapter_that_plain_peft_loads(name: str, tmp_path: Path) -> None:
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    model = fresh_adapters(random_base(name), name, "CAUSAL_LM", new_head=False, **lora).train()
    targets = find_target_modules(model)
    without = tuple(f"{module}." for module in left_out(random_base(name)))
    assert without
    assert not any(f"{target.name}.".startswith(without) for target in targets)

    tokens = torch.randint(5, 200, (2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    loader = DataLoader(rows, batch_size=ROWS)
    batch = next(iter(loader))
    step = StepConfig(batch_size=ROWS, max_length=LENGTH, exact_savers=False)
    cost = from_config(configuration(name), step, LoadedAs(device="cpu", dtype=torch.float32)).memory.cost()
    ranks = np.array([min(8, target.max_rank) for target in targets])
    assert plan_cost(cost, ranks) == pytest.approx(adamw_run(model, batch, fused=True).peak(ranks), rel=0.005)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    pilot = RankPilot("top-down", "85%", exact_savers=False, gradient_checkpointing=False)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=2))
    assert adapter_ranks(targets) != dict(zip(adapter_ranks(targets), ranks.tolist(), strict=True))
    for batch in loader:
        take_step(pilot, optimizer, batch, lambda rows: model(**rows).loss)
    pilot.finish()
    assert all(measured <= predicted for _, predicted, measured in pilot.checks)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_base(name), tmp_path)
    with torch.no_grad():
        ours, theirs = (each.eval()(input_ids=tokens[:2]).logits for each in (model, loaded))
    assert torch.equal(ours, theirs)


def test_what_all_linear_leaves_out_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    fresh_adapters(random_base("deepseek-v3"), "x", None, new_head=False, target_modules="all-linear", r=2)
    (record,) = caplog.records
    for words in ("routers", "fused experts", "down_proj, gate_proj, up_proj, which PEFT treats"):
        assert words in record.message


def test_routers_that_peft_adapts_are_refused() -> None:
    model = get_peft_model(random_base("llama4"), LoraConfig(target_modules=["router", "q_proj"]))
    with pytest.raises(UnsupportedError, match=r"feed_forward.router': it is a router.*remove the module"):
        find_target_modules(model)


@pytest.mark.parametrize(
    ("name", "changes", "step", "error"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, {}, r"num_experts_per_tok=9 of its 8 experts. It must be 1 to 8"),
        (
            "gpt-oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            {"quantization": "nf4"},
            "stored in mxfp4.*bf16",
        ),
    ],
)
def test_a_configuration_that_cannot_be_tells_what_can(
    name: str, changes: dict[str, Any], step: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error) as caught:
        from_config(configuration(name, **changes), StepConfig(batch_size=2, max_length=8, **step))
    assert "\n" not in str(caught.value)


def test_experts_compute_as_much_in_every_precision() -> None:
    def flops(dtype: torch.dtype) -> float:
        step = StepConfig(batch_size=2, max_length=16, exact_savers=False, target_modules="q_proj")
        config = configuration("mixtral", attn_implementation="eager")
        work = from_config(config, step, LoadedAs(dtype=dtype), counted=True).work
        assert work is not None
        return float(work.flops.sum())

    assert flops(torch.bfloat16) == flops(torch.float32)


def test_attention_by_name_is_priced_as_torch_s() -> None:
    def peak(**changes: Any) -> float:
        step = StepConfig(batch_size=2, max_length=16, exact_savers=False, target_modules="q_proj")
        configured = from_config(t.LlamaConfig(**_TEXT, **changes), step)
        return configured.memory.peak(np.full(len(configured.targets), 8))

    names = ("flash_attention_2", "flash_attention_3", "flex_attention")
    assert {peak(attn_implementation=name) for name in names} == {peak()}
