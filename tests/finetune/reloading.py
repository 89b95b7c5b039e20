"""Loads the adapters that fine-tunes save with plain PEFT in fresh processes, and compares logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rankpilot.data.models import bitsandbytes_settings, head_options, load_config, resolve_model
from rankpilot.data.task import KINDS
from rankpilot.data.workload import Workload
from rankpilot.finetune import experiment
from rankpilot.finetune.options import PILOT, FinetuneConfig
from safetensors.torch import load_file, save_file

from ..warm_python import WarmPython

_RELOAD = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
import peft, transformers
spec = json.load(sys.stdin)
kind = getattr(transformers, spec["auto_class"])
if spec["bitsandbytes"]:
    spec["options"]["quantization_config"] = transformers.BitsAndBytesConfig(**spec["bitsandbytes"])
base = kind.from_pretrained(spec["base"], **spec["options"])
if spec["bitsandbytes"]:
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or it would compute in bfloat16
model = PeftModel.from_pretrained(base, spec["adapter"]).eval()
with torch.no_grad():
    logits = model(**load_file(spec["inputs"])).logits
save_file({"logits": logits.contiguous()}, spec["logits"])
assert not any(name.split(".")[0] == "rankpilot" for name in sys.modules)
"""


def check_reload(
    config: FinetuneConfig, workload: Workload, model: PeftModel, adapter: Path, python: WarmPython
) -> dict[str, Any]:
    """Load the adapter with plain PEFT in a fresh process that never imports rankpilot, and compare logits.

    Returns:
        `identical`, and `max_abs_difference` of the logits of 16 held-out rows.
    """
    scratch = adapter.parent / "reload"
    scratch.mkdir(exist_ok=True)
    if workload.collator:
        rows = [workload.held_out[i] for i in range(min(16, len(workload.held_out)))]
        batch = {name: workload.collator(rows)[name].cpu() for name in ("input_ids", "attention_mask")}
    else:  # TRL has the tokens
        batch = {"input_ids": torch.arange(3, 11).repeat(2, 1)}
    model = model.cpu().eval()
    with torch.no_grad():
        expected = model(**batch).logits
    save_file({k: v.contiguous() for k, v in batch.items()}, scratch / "inputs.safetensors")
    spec = {
        "base": resolve_model(config.model),
        "options": head_options(workload.task, workload.labels),
        "bitsandbytes": bitsandbytes_settings(load_config(config.model), workload.task, config.quantization),
        "auto_class": KINDS[workload.task].auto_class,
        "adapter": str(adapter.resolve()),
        "inputs": str((scratch / "inputs.safetensors").resolve()),
        "logits": str((scratch / "logits.safetensors").resolve()),
    }
    command = [sys.executable, "-c", _RELOAD]
    done = python.run(command, input=json.dumps(spec), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    difference = float((load_file(scratch / "logits.safetensors")["logits"] - expected).abs().max())
    return {"identical": difference == 0.0, "max_abs_difference": difference}


@contextmanager
def reloaded(python: WarmPython) -> Iterator[list[dict[str, Any]]]:
    """What `check_reload` finds of each adapter that a fine-tune under a policy saves inside."""
    found: list[dict[str, Any]] = []
    configs: list[FinetuneConfig] = []
    run_one, save = experiment.run_one, experiment._save_adapter

    def run(config: FinetuneConfig, *arguments: Any, **options: Any) -> dict[str, Any]:
        configs.append(config)
        return run_one(config, *arguments, **options)

    def save_and_check(model: PeftModel, workload: Workload, folder: Path) -> None:
        save(model, workload, folder)
        if folder.name == PILOT:
            found.append(check_reload(configs[-1], workload, model, folder / "adapter", python))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "run_one", run)
        patch.setattr(experiment, "_save_adapter", save_and_check)
        yield found
