"""Models in four and eight bits: what is quantised, what trains, and how many bytes are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.step_config import Quantization
from rankpilot.data.models import adapt, load_model
from rankpilot.data.task import Task
from rankpilot.finetune.experiment import finetune
from rankpilot.finetune.options import FinetuneConfig
from rankpilot.lora.targets import find_target_modules
from torch import nn

from ..cases import first_cases
from .conftest import ModelFolder
from .small_models import WORDS, write_rows

TASKS: list[tuple[str, Task]] = [
    *(("llama", "causal-lm"), ("bert", "classification"), ("t5", "classification")),
]
OPTIONS = {"target_modules": "all-linear", "r": 2, "lora_alpha": 4}


@pytest.fixture(params=["nf4", "int8"])
def quantization(request: pytest.FixtureRequest) -> Quantization:
    """Both ways to quantise in turn."""
    pytest.importorskip("bitsandbytes")
    chosen: Quantization = request.param
    return chosen


def load(name: str, folder: str, task: Task, quantization: Quantization) -> Any:
    return load_model(folder, task, ("a", "b") if task == "classification" else (), None, quantization)


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


@pytest.mark.parametrize(("name", "task"), TASKS, ids=lambda value: str(value))
def test_adapters_and_heads_train_on_a_quantised_model(name, task, quantization, model_folder):
    base = load(name, model_folder(name), task, quantization)
    assert not base.is_gradient_checkpointing
    model = adapt(base, name, task, **OPTIONS)
    targets = find_target_modules(model)
    # T5 keeps these in full precision, since half precision is too coarse for them.
    plain = {target.name for target in targets if not is_quantised(target.layer.get_base_layer())}
    assert plain == {target.name for target in targets if name == "t5" and target.name.endswith(".wo")}
    trained = [name for name, value in model.named_parameters() if value.requires_grad and "lora" not in name]
    assert bool(trained) == (task == "classification")
    ids = torch.arange(3, 11).repeat(2, 1)
    ids[:, -1] = 2
    labels = {"classification": torch.tensor([0, 1]), "regression": torch.tensor([0.5, 1.0])}
    labels["token-classification"] = ids % 2
    batch = {"input_ids": ids, "labels": labels.get(task, ids)}
    model.eval()
    with torch.no_grad():
        model(**batch)  # an evaluation must not repack the weights
    model.train()(**batch).loss.backward()
    for target in targets:
        assert target.weight_b.grad is not None, target.name
        assert bool(target.weight_b.grad.isfinite().all()), target.name
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_what_is_not_quantised_is_in_fp32_if_it_is_prepared(model_folder: ModelFolder, tmp_path: Path) -> None:
    load("llama", model_folder("llama"), "causal-lm", "none").to(torch.bfloat16).save_pretrained(tmp_path)
    for prepares, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = load_model(str(tmp_path), "causal-lm", (), None, "nf4", prepare_kbit=prepares)
        assert {model.lm_head.weight.dtype, model.model.norm.weight.dtype} == {dtype}


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, model_folder: ModelFolder) -> None:
    monkeypatch.setattr("rankpilot.cost.training_step.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"The quantization nf4 requires bitsandbytes: pip install"):
        load("llama", model_folder("llama"), "causal-lm", "nf4")


@pytest.mark.parametrize("quantization", first_cases(1, ["nf4", "int8"]), indirect=True)
def test_a_run_on_a_quantised_model(quantization, model_folder, tmp_path, reloads):
    checkpointing = quantization == "nf4"
    rows = [{"text": " ".join([WORDS[row % 5]] * (2 + row % 4)), "label": row % 2} for row in range(60)]
    config = FinetuneConfig(model_folder("bert"), write_rows(tmp_path / "rows.jsonl", rows), steps=3, eval_every=2)
    settings = {"quantization": quantization, "gradient_checkpointing": checkpointing, "batch_size": 4, "max_length": 8}
    summary = finetune(replace(config, **settings), tmp_path / "run")
    run = summary["runs"]["rankpilot"]
    assert 0 < run["peak_bytes"] <= run["budget_bytes"]
    assert reloads[0]["max_abs_difference"] < 1e-5
