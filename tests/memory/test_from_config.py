"""Training steps from configurations alone, beside the same steps with contents."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import prepare_model_for_kbit_training
from rankpilot.errors import UnknownNameError, UnsupportedError
from rankpilot.lora.frozen_weights import guard_base
from rankpilot.memory.batch_shape import BatchShape
from rankpilot.memory.breakdown import frozen_bytes
from rankpilot.memory.cost import plan_cost
from rankpilot.memory.device_table import WORKSPACE_BYTES
from rankpilot.memory.from_config import LoadedAs, from_config
from rankpilot.memory.step_config import OptimizerName, StepConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DebertaV2Config, PreTrainedModel

from .configurations import CONFIGURATIONS
from .measured import adamw_run, random_plans
from .real import largest_error, largest_price_error, real_memory

STEP: dict[str, Any] = {"batch_size": 4, "max_length": 24}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "checkpointed": ({"checkpointing": True}, {}),
    "reentrant": ({"checkpointing": True}, {"reentrant": True}),
    "dora": ({}, {"adapter": {"use_dora": True}}),
    "autocast": ({"bf16": True}, {}),
    "bf16": ({}, {"dtype": torch.bfloat16}),
    "padded": ({}, {"padded": True}),
    "dropout": ({}, {"adapter": {"lora_dropout": 0.1}}),
}
OTHERS_STAND_FOR = ("roberta", "t5", "qwen2", "mistral-window", "phi3", "bloom", "falcon")
"""Families whose plain step is left to `make test-long`: they are built as others are."""

FAST = {
    *(("llama", form) for form in FORMS if form != "reentrant"),
    *((name, "plain") for name in CONFIGURATIONS if name not in OTHERS_STAND_FOR),
    ("bert", "reentrant"),
    ("gpt2", "dora"),
    ("modernbert", "bf16"),
}

LAYER_NORMS = ("falcon", "bloom", "neox", "gpt2", "bert", "roberta", "distilbert", "modernbert")
"""Families whose statistics of norms in bf16 are as on CUDA, in fp32, while the CPU has them in bf16."""


def allowed(name: str, form: str) -> float:
    return 0.002 if form == "bf16" and name in LAYER_NORMS else 0.0


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if (name, form) in FAST else pytest.mark.long)
        for name, form in product(CONFIGURATIONS, FORMS)
    ],
)
def test_prices_of_two_hundred_plans_are_those_of_the_real_model(name, form):
    step, loaded = FORMS[form]
    assert largest_error(CONFIGURATIONS[name], StepConfig(**STEP | step), 200, **loaded) <= allowed(name, form)


def test_eager_attention_is_as_in_the_configuration():
    config = type(CONFIGURATIONS["llama"]).from_dict(CONFIGURATIONS["llama"].to_dict())
    config._attn_implementation = "eager"
    assert largest_error(config, StepConfig(**STEP)) == 0


def test_the_peak_of_real_steps_is_the_price_from_the_configuration():
    step, loaded = StepConfig(**STEP), LoadedAs(device="cpu", dtype=torch.float32)
    _, model, batch = real_memory(CONFIGURATIONS["llama"], step, loaded)
    run = adamw_run(model, batch, fused=True)
    cost = from_config(CONFIGURATIONS["llama"], step, loaded).memory.cost()
    for ranks in random_plans(run.targets, np.random.default_rng(0), 5):
        assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks) + 1024, rel=1e-9)  # room for the loop's scalars


# Quantised bases ---------------------------------------------------------------------------------------------------


def quantised(folder: Path, name: str, **settings: Any) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGURATIONS[name]).to(torch.bfloat16).save_pretrained(folder)
    quantization = BitsAndBytesConfig(**settings)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    guard_base(base)
    prepared: PreTrainedModel = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    prepared.config.use_cache = False
    return prepared


@pytest.mark.parametrize(
    ("name", "quantization", "double"),
    [("llama", "nf4", True), ("qwen2", "nf4", False), ("qwen2", "int8", False)],
)
def test_quantised_bases_take_the_bytes_of_real_ones(name, quantization, double, tmp_path):
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        options = {"quant_type": "nf4", "use_double_quant": double, "compute_dtype": torch.bfloat16}
        settings = {"load_in_4bit": True} | {f"bnb_4bit_{key}": value for key, value in options.items()}
    base = quantised(tmp_path, name, **settings)
    step = StepConfig(**STEP, quantization=quantization)
    loaded = LoadedAs(device="cpu", dtype=torch.bfloat16, double_quantization=double)
    memory, model, _ = real_memory(CONFIGURATIONS[name], step, loaded, base)
    hollow = from_config(CONFIGURATIONS[name], step, loaded)
    assert hollow.frozen_bytes == frozen_bytes(model)
    assert largest_price_error(hollow.memory, memory) == 0


# What is asked for -------------------------------------------------------------------------------------------------


def test_the_result_tells_of_the_base_and_of_other_shapes():
    step = from_config(
        "smollm2-135m", StepConfig(batch_size=2, max_length=64, target_modules="q_proj"), LoadedAs(device="cpu")
    )
    assert step.parameters == 134_515_008
    assert step.frozen_bytes == pytest.approx(2 * 134_515_008, rel=1e-4)  # and the buffers of rotary positions
    assert step.workspace_bytes == 0
    assert step.memory.shape == BatchShape(2, 64)
    assert {parameter.device.type for parameter in step.model.parameters()} == {"meta"}
    ranks = np.full(len(step.targets), 8)
    small, large = (plan_cost(step.memory.cost(BatchShape(rows, 128)), ranks) for rows in (2, 8))
    assert 3 < large / small < 4.1


def test_cuda_rounds_up_and_takes_workspaces():
    step = from_config(CONFIGURATIONS["llama"], StepConfig(**STEP))
    assert step.workspace_bytes == 2 * WORKSPACE_BYTES
    base, _ = step.memory.sizes(BatchShape(4, 24))
    assert (base % 512 == 0).all()


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_has_its_bytes(optimizer):
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    loaded = LoadedAs(device="cpu", dtype=torch.float32)
    assert largest_error(CONFIGURATIONS["llama"], StepConfig(**STEP, optimizer=optimizer), 20, **vars(loaded)) == 0


def test_an_output_that_is_kept_counts_at_the_peak():
    ranks = np.full(14, 8)
    step, loaded = StepConfig(**STEP), [LoadedAs(keeps_output=kept) for kept in (False, True)]
    prices = [plan_cost(from_config(CONFIGURATIONS["llama"], step, how).memory.cost(), ranks) for how in loaded]
    assert prices[0] < prices[1] <= prices[0] + 4 * 24 * 256 * 4


def test_padding_takes_a_mask_and_other_kernels():
    ranks = np.full(14, 8)
    step = StepConfig(batch_size=4, max_length=256)
    loaded = [LoadedAs(dtype=torch.bfloat16, padded=padded) for padded in (False, True)]
    full, padded = (plan_cost(from_config(CONFIGURATIONS["llama"], step, how).memory.cost(), ranks) for how in loaded)
    assert padded > full


# What cannot be predicted ------------------------------------------------------------------------------------------


def test_what_depends_on_contents_is_refused_in_one_line():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    with pytest.raises(
        UnsupportedError, match=r"A step of 'deberta-v2' cannot be predicted.*depends on contents"
    ) as error:
        from_config(DebertaV2Config(**sizes, num_attention_heads=4), StepConfig(**STEP))
    assert "\n" not in str(error.value)


def test_mistakes_are_told():
    with pytest.raises(UnknownNameError, match=r"Unknown target module 'q_prj'. Did you mean: 'q_proj'"):
        from_config(CONFIGURATIONS["llama"], StepConfig(**STEP, target_modules="q_prj"))
