"""Calibration of models whose first call differs from later ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rankpilot.lora.frozen_weights import guard_base
from rankpilot.memory.batch_shape import BatchShape
from rankpilot.memory.cost import plan_cost
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from .measured import Run, adamw_run, random_plans

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def nf4_run(folder: Path) -> Run:
    """A Qwen2 in four bits, as just loaded; its attention has biases."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4), device_map="cpu", dtype=torch.bfloat16
    )
    guard_base(base)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()
    return adamw_run(model, tokens(4, 12))


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_quantised_layers_that_cast_their_biases_once_are_known_at_other_shapes(tmp_path):
    run = nf4_run(tmp_path)
    memory = run.calibrated()
    for rows, length in ((4, 12), (9, 7)):
        batch = tokens(rows, length)
        cost = memory.cost(BatchShape.of(batch))
        for ranks in random_plans(run.targets, np.random.default_rng(0), 3):
            assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks, batch), rel=1e-9)
