"""A proxy base with LoRA adapters, and what plans on it cost."""

from __future__ import annotations

from functools import lru_cache

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ...lora.targets import TargetModule, find_target_modules
from ...memory.batch_shape import BatchShape
from ...memory.calibration import calibrate
from ...memory.cost import ParameterCost, UntimedCost
from ...memory.model import MemoryModel
from .bases import Unit, find_base, load_base_model

ALPHA = 16
"""`lora_alpha` of proxy runs: the scaling is 16 / rank, 2 at rank 8, PEFT users' most common setting."""


CALIBRATED_ROWS = 4
"""Rows from which on calibration records the same small steps, whatever their number."""


@lru_cache(maxsize=16)
def adapted_base(name: str) -> tuple[PeftModel, list[TargetModule]]:
    """The proxy base with a LoRA pair on every target module; one a process, since episodes run one after another."""
    base = find_base(name)
    config = LoraConfig(
        r=8,
        lora_alpha=ALPHA,
        target_modules=list(base.target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=base.family == "gpt2",
    )
    model = get_peft_model(load_base_model(name), config)
    return model, find_target_modules(model)


@lru_cache(maxsize=256)
def proxy_cost(base: str, rows: int, length: int, unit: Unit = "bytes", checkpointing: bool = False) -> UntimedCost:
    """What plans on a proxy base cost at one batch shape."""
    if unit == "parameters":
        return ParameterCost.of(adapted_base(base)[1])
    return proxy_memory(base, length, checkpointing).cost(BatchShape(rows, length))


@lru_cache(maxsize=64)
def proxy_memory(base: str, length: int, checkpointing: bool) -> MemoryModel:
    """Predicts the memory of any number of rows."""
    model, targets = adapted_base(base)
    tokens = torch.zeros(CALIBRATED_ROWS, length, dtype=torch.int64)
    inner = model.get_base_model()
    if not checkpointing:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens})
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training alone; the bases have no dropout
    try:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens})
    finally:
        inner.gradient_checkpointing_disable()
        if hasattr(inner, "_require_grads_hook"):  # set by enabling; it would make all later steps save everything
            inner.disable_input_require_grads()
        model.eval()
