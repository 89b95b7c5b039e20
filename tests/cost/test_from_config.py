"""Training steps from configurations alone, beside the same steps with contents."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers as t
from peft import PeftModel, prepare_model_for_kbit_training
from rankpilot.common.errors import UnknownNameError, UnsupportedError
from rankpilot.cost.cards import WORKSPACE_BYTES
from rankpilot.cost.cost import moment_costs, plan_cost
from rankpilot.cost.forecast.configured_step import LoadedAs
from rankpilot.cost.forecast.from_config import PEFT_TYPES, base_on_meta, from_config, usual_class
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.record.calibration import measure_memory
from rankpilot.cost.record.model_states import frozen_bytes
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.exact import ExactSavers
from rankpilot.cost.step_config import OptimizerName, StepConfig
from rankpilot.cost.training_step import TrainingStep, model_loss, new_optimizer, release_inputs, switch_checkpointing
from rankpilot.lora.peft_config import fresh_adapters
from rankpilot.lora.targets import find_target_modules, guard_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DebertaV2Config, PreTrainedConfig, PreTrainedModel

from .measured import adamw_run, random_plans

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_T5: dict[str, Any] = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}

CONFIGURATIONS: dict[str, t.PreTrainedConfig] = {
    "llama": t.LlamaConfig(**_GROUPED),
    "mistral-window": t.MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": t.Qwen2Config(**_GROUPED),
    "qwen3": t.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": t.Gemma2Config(**_GROUPED, head_dim=16),
    "gemma3": t.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=8),
    "phi3": t.Phi3Config(**_GROUPED, pad_token_id=0),
    "falcon": t.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "bloom": t.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4),
    "neox": t.GPTNeoXConfig(**_TEXT),
    "gpt2": t.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4),
    "bert": t.BertConfig(**_TEXT),
    "roberta": t.RobertaConfig(**_TEXT, pad_token_id=1),
    "distilbert": t.DistilBertConfig(vocab_size=256, dim=64, hidden_dim=96, n_layers=2, n_heads=4),
    "modernbert": t.ModernBertConfig(**_TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2),
    "t5": t.T5Config(**_T5, decoder_start_token_id=0),
    "flan-t5": t.T5Config(**_T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
if hasattr(t, "Gemma4TextConfig"):  # its layers have numbers of heads of their own
    _HEADS = {"head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    CONFIGURATIONS["gemma4"] = t.Gemma4TextConfig(**_GROUPED, **_HEADS, hidden_size_per_layer_input=0)


RANKS = (0, 1, 4, 8, 16, 64)


def real_memory(
    config: PreTrainedConfig, step: StepConfig, loaded: LoadedAs, base: PreTrainedModel | None = None
) -> tuple[MemoryModel, PeftModel, dict[str, torch.Tensor]]:
    """The byte model of the step on a real model on the CPU, that model, and its batch; `base` may be quantised."""
    config = copy.deepcopy(config)
    auto_class = usual_class(config)
    base = base or base_on_meta(config, auto_class, loaded.dtype)  # here on the CPU
    if step.gradient_checkpointing is True:
        switch_checkpointing(base, True, reentrant=loaded.reentrant)
    kind = PEFT_TYPES[auto_class]
    adapter = {"r": 8, "lora_alpha": 16} | loaded.adapter
    model = fresh_adapters(
        base, config.model_type, kind, new_head=kind.endswith("CLS"), target_modules=step.target_modules, **adapter
    ).train()
    if not loaded.input_gradients:
        release_inputs(model)
    training = TrainingStep(model, model_loss(model), new_optimizer(step.optimizer, model))
    batch = real_batch(config, step, loaded, rows_only=auto_class.endswith("SequenceClassification"))
    with torch.autocast("cpu", torch.bfloat16) if step.bf16 else nullcontext():
        targets = find_target_modules(model)

        def measured() -> MemoryModel:
            return measure_memory(training, targets, batch, signals=False)

        if step.exact_savers:
            ExactSavers(model)
        return measured(), model, batch


def real_batch(
    config: PreTrainedConfig, step: StepConfig, loaded: LoadedAs, *, rows_only: bool
) -> dict[str, torch.Tensor]:
    """Random tokens without those that a model reads as its padding or the end of a text."""
    shape = (step.batch_size, step.max_length)
    tokens = torch.randint(5, config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if loaded.padded:
        mask[-1, -1] = 0
    labels = torch.arange(step.batch_size) % config.num_labels if rows_only else tokens
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def largest_error(config: PreTrainedConfig, step: StepConfig, plans: int = 40, **options: Any) -> float:
    """The largest error of prices from the configuration, on the CPU."""
    loaded = replace(LoadedAs(device="cpu", dtype=torch.float32), **options)
    real, _, _ = real_memory(config, step, loaded)
    return largest_price_error(from_config(config, step, loaded).memory, real, plans)


def largest_price_error(hollow: MemoryModel, real: MemoryModel, plans: int = 40) -> float:
    """The largest relative difference between prices of random plans."""
    ours, theirs = hollow.cost(), real.cost()
    ranks = np.random.default_rng(0).choice(RANKS, size=(plans, theirs.per_rank.shape[1]))
    ranks[plans // 2 :, : ranks.shape[1] // 2] = 0
    return float(np.abs(moment_costs(ours, ranks).max(axis=1) / moment_costs(theirs, ranks).max(axis=1) - 1).max())


STEP: dict[str, Any] = {"batch_size": 4, "max_length": 24}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "checkpointed": ({"gradient_checkpointing": True}, {}),
    "reentrant": ({"gradient_checkpointing": True}, {"reentrant": True}),
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


def quantised(folder: Path, name: str, prepare: bool = True, **settings: Any) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGURATIONS[name]).to(torch.bfloat16).save_pretrained(folder)
    quantization = BitsAndBytesConfig(**settings)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    guard_base(base)
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if prepare else base
    prepared.config.use_cache = False
    return prepared  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "quantization", "double", "prepare"),
    [
        ("llama", "nf4", True, True),
        ("llama", "nf4", True, False),
        ("qwen2", "nf4", False, True),
        ("qwen2", "int8", False, True),
    ],
)
def test_quantised_bases_take_the_bytes_of_real_ones(name, quantization, double, prepare, tmp_path):
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        options = {"quant_type": "nf4", "use_double_quant": double, "compute_dtype": torch.bfloat16}
        settings = {"load_in_4bit": True} | {f"bnb_4bit_{key}": value for key, value in options.items()}
    base = quantised(tmp_path, name, prepare, **settings)
    step = StepConfig(**STEP, quantization=quantization, prepare_kbit=prepare)
    loaded = LoadedAs(device="cpu", dtype=torch.bfloat16, double_quantization=double)
    memory, model, _ = real_memory(CONFIGURATIONS[name], step, loaded, base)
    hollow = from_config(CONFIGURATIONS[name], step, loaded)
    assert hollow.model.frozen_bytes == frozen_bytes(model)
    assert largest_price_error(hollow.memory, memory) == 0


# What is asked for -------------------------------------------------------------------------------------------------


def test_the_result_tells_of_the_base_and_of_other_shapes():
    step = from_config(
        "smollm2-135m", StepConfig(batch_size=2, max_length=64, target_modules="q_proj"), LoadedAs(device="cpu")
    )
    assert step.model.parameters == 134_515_008
    assert step.model.frozen_bytes == pytest.approx(2 * 134_515_008, rel=1e-4)  # and the buffers of rotary positions
    assert step.model.workspace_bytes == 0
    assert step.memory.shape == BatchShape(2, 64)
    ranks = np.full(len(step.targets), 8)
    small, large = (plan_cost(step.memory.cost(BatchShape(rows, 128)), ranks) for rows in (2, 8))
    assert 3 < large / small < 4.1


def test_cuda_rounds_up_and_takes_workspaces():
    step = from_config(CONFIGURATIONS["llama"], StepConfig(**STEP))
    assert step.model.workspace_bytes == 2 * WORKSPACE_BYTES
    base, _ = step.memory.sizes(BatchShape(4, 24))
    assert (base % 512 == 0).all()


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_has_its_bytes(optimizer):
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    loaded = LoadedAs(device="cpu", dtype=torch.float32)
    assert largest_error(CONFIGURATIONS["llama"], StepConfig(**STEP, optimizer=optimizer), 20, **vars(loaded)) == 0


def test_an_output_that_is_kept_and_padding_count_at_the_peak():
    def price(rows: int, length: int, **options: Any) -> float:
        step = StepConfig(batch_size=rows, max_length=length, exact_savers=False)
        memory = from_config(CONFIGURATIONS["llama"], step, LoadedAs(**options)).memory
        return plan_cost(memory.cost(), np.full(14, 8))

    assert 0 < price(4, 24, keeps_output=True) - price(4, 24) <= 4 * 24 * 256 * 4
    half = {"dtype": torch.bfloat16}
    assert price(4, 256, **half, padded=True) > price(4, 256, **half), "a mask, and other kernels"


# What cannot be predicted ------------------------------------------------------------------------------------------


def test_what_depends_on_contents_is_refused_in_one_line():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    with pytest.raises(
        UnsupportedError, match=r"A step of 'deberta-v2' cannot be predicted.*operations depend on data"
    ) as error:
        from_config(DebertaV2Config(**sizes, num_attention_heads=4), StepConfig(**STEP))
    assert "\n" not in str(error.value)


def test_mistakes_are_told():
    with pytest.raises(UnknownNameError, match=r"Unknown target module 'q_prj'. Did you mean: 'q_proj'"):
        from_config(CONFIGURATIONS["llama"], StepConfig(**STEP, target_modules="q_prj"))
