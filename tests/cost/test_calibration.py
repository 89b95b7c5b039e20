"""Calibration of models whose first call differs from later ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.batch_shape import shape_of
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.record.calibration import calibrate
from rankpilot.lora.targets import find_target_modules, guard_base
from torch import nn
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
        cost = memory.cost(shape_of(batch))
        for ranks in random_plans(run.targets, np.random.default_rng(0), 3):
            assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks, batch), rel=1e-9)


class Layers(nn.Module):
    """Layers, each with one part that runs and one for images that does not."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.text, self.image = (nn.ModuleList(nn.Linear(8, 8) for _ in range(count)) for _ in range(2))
        self.mixed = nn.ModuleList(nn.ModuleDict({"text": nn.Linear(8, 8), "image": nn.Linear(8, 8)}) for _ in range(5))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = input_ids[..., None].expand(-1, -1, 8).float()
        for layer in (*self.text, *(layer["text"] for layer in self.mixed)):
            hidden = layer(hidden)
        return hidden.square().mean()


def adapted(**options: str) -> nn.Module:
    return get_peft_model(Layers(4), LoraConfig(**options))


def refusal(modules: str) -> str:
    model = adapted(target_modules=modules)
    with pytest.raises(UnsupportedError) as caught:
        calibrate(model, find_target_modules(model), tokens(4, 12), loss=lambda batch: model(batch["input_ids"]))
    return str(caught.value)


def test_modules_that_take_no_part_are_counted_with_a_line_that_leaves_them_out():
    modules = r"(text|image)\.\d"
    text = refusal(modules)
    assert text.startswith("4 of 8 target modules took no part in the forward pass, all those of 'image'.")
    model = adapted(target_modules=modules, exclude_modules=re.search(r'exclude_modules=r"(.+)"', text)[1])
    assert [target.name for target in find_target_modules(model)] == [f"text.{index}" for index in range(4)]


def test_where_modules_of_many_places_take_no_part_some_are_named():
    text = refusal(r"mixed\.\d\..*")
    assert "5 of 10 target modules" in text
    assert "'mixed.0.image', 'mixed.1.image', 'mixed.2.image' and 2 more. Remove them from `target_modules`." in text
