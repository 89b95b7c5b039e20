"""The same training step on the CPU with contents and from its configuration, and how far their prices differ."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rankpilot.lora.fresh import fresh_adapters
from rankpilot.lora.targets import find_target_modules
from rankpilot.memory.calibration import measure_memory
from rankpilot.memory.cost import moment_costs
from rankpilot.memory.from_config import PEFT_TYPES, LoadedAs, from_config, hollow_base, usual_class
from rankpilot.memory.model import MemoryModel
from rankpilot.memory.step_config import StepConfig
from rankpilot.memory.training_step import TrainingStep, model_loss, new_optimizer, release_inputs, switch_checkpointing
from transformers import PreTrainedConfig, PreTrainedModel

RANKS = (0, 1, 4, 8, 16, 64)


def real_memory(
    config: PreTrainedConfig, step: StepConfig, loaded: LoadedAs, base: PreTrainedModel | None = None
) -> tuple[MemoryModel, PeftModel, dict[str, torch.Tensor]]:
    """The byte model of the step on a real model on the CPU, that model, and its batch; `base` may be quantised."""
    config = copy.deepcopy(config)
    auto_class = usual_class(config)
    base = base or hollow_base(config, auto_class, loaded.dtype)  # here on the CPU
    if step.checkpointing:
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
        return measure_memory(training, find_target_modules(model), batch, signals=False), model, batch


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
