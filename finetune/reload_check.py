"""Loads a saved adapter with plain PEFT in a fresh process, and compares logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..data.models import head_options, load_config, resolve_model
from ..data.quantised import bitsandbytes_settings
from ..data.task import KINDS
from ..data.workload import Workload
from ..errors import RunFolderError
from .config import FinetuneConfig

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


def check_reload(config: FinetuneConfig, workload: Workload, model: PeftModel, adapter: Path) -> dict[str, Any]:
    """Load the adapter with plain PEFT in a fresh process that never imports rankpilot, and compare logits.

    Returns:
        `identical`, and `max_abs_difference` of the logits of 16 held-out rows.
    """
    scratch = adapter.parent / "reload"
    scratch.mkdir(exist_ok=True)
    rows = [workload.held_out[i] for i in range(min(16, len(workload.held_out)))]
    kept = ("input_ids", "attention_mask", *(("labels",) if workload.task == "seq2seq" else ()))
    batch = {name: tensor.cpu() for name, tensor in workload.collator(rows).items() if name in kept}
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
    done = subprocess.run(command, input=json.dumps(spec), text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RunFolderError(f"Plain PEFT could not load {adapter}: {done.stderr.strip().splitlines()[-1:]}")
    difference = float((load_file(scratch / "logits.safetensors")["logits"] - expected).abs().max())
    return {"identical": difference == 0.0, "max_abs_difference": difference}
