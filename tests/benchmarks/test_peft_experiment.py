"""The experiment for PEFT's comparison: what is stored keeps the limits, and plain PEFT reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peft_experiment import LAYERS, MOST_GIB, MOST_SECONDS, Plan, chosen, page, write_experiment

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "peft_experiment"


def plan(gib: float, seconds: float, loss: float) -> Plan:
    return Plan("MLP", 12, 64, gib, seconds, (loss, 1.0))


def test_the_least_loss_within_both_limits_is_taken() -> None:
    found = [plan(16.1, 700, -3), plan(15, 801, -2), plan(16, 800, -1), plan(9, 400, 0)]
    assert chosen(found) is found[2]


def test_an_experiment_is_read_by_plain_peft(tmp_path: Path) -> None:
    made = plan(15, 700, -1)
    write_experiment(tmp_path, made, 640)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page(made, 640)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert config.base_model_name_or_path is None
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=LAYERS, **sizes))
        targets = find_target_modules(get_peft_model(base, config))
    layers = {int(re.findall(r"layers\.(\d+)\.", target.name)[0]) for target in targets}
    assert layers == set(range(LAYERS - 12, LAYERS))
    assert {target.name.rpartition(".")[2] for target in targets} == {"gate_proj", "up_proj", "down_proj"}


def test_the_stored_experiment_keeps_the_limits() -> None:
    told = (STORED / "README.md").read_text(encoding="utf-8")
    gib, seconds = re.findall(r"\| ([\d.]+) GiB \||\| (\d+) s \|", told)
    assert float(gib[0]) <= MOST_GIB
    assert float(seconds[1]) <= MOST_SECONDS
    config = PeftConfig.from_pretrained(str(STORED))
    layers = config.layers_to_transform
    assert f"rank {config.r} on " in told
    assert f"of the top {len(layers)} of {LAYERS} layers" in told
    assert layers == list(range(LAYERS - len(layers), LAYERS))
    assert json.loads((STORED / "training_params.json").read_text())["optimizer_kwargs"]["lr"] == 1e-4
