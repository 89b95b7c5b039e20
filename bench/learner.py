"""One LoRA fine-tune whose ranks can be set and whose steps can be measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from ..common.arrays import IntArray
from ..lora.resize import set_ranks
from ..lora.targets import find_target_modules
from ..memory.calibration import calibrate
from ..memory.model import MemoryModel
from ..memory.peak_meter import PeakMeter
from ..memory.recording import Batch

START_RANK = 8
"""Rank that every adapter has at first; all-linear LoRA of this rank is what plans are compared with."""


class Learner:
    """A model with an adapter on each target module under fused AdamW, in the order of transformers' Trainer.

    Args:
        base: the model, on its device.
        learning_rate: of the first step.
        seed: of the adapters.
        autocast: run forward passes in bfloat16 autocast.
        lora: further fields of `peft.LoraConfig`, such as `task_type`.

    Attributes:
        model: the PEFT model, in training mode.
        targets: its target modules.
        optimizer: of all that trains.
    """

    def __init__(
        self, base: PreTrainedModel, *, learning_rate: float = 1e-3, seed: int = 0, autocast: bool = False, **lora: Any
    ) -> None:
        settings = {"r": START_RANK, "lora_alpha": 2 * START_RANK, "target_modules": "all-linear"} | lora
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(base, LoraConfig(**settings)).train()
        self.targets = find_target_modules(self.model)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        self.device = base.device
        self._seed, self._autocast = seed, autocast

    def set_ranks(self, ranks: Sequence[int] | IntArray) -> IntArray:
        """Give each module its rank, or the most that it can have; returns the ranks, int64 (modules,)."""
        plan = {target.name: int(rank) for target, rank in zip(self.targets, ranks, strict=True)}
        set_ranks(self.targets, plan, self.optimizer, seed=self._seed)
        return np.array([target.rank for target in self.targets], dtype=np.int64)

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    def step(self, batch: Batch) -> None:
        """One whole training step."""
        self._backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measured_step(self, batch: Batch) -> int:
        """The same, with its peak measured; returns bytes."""
        meter = PeakMeter()
        meter.begin(self.model, self.optimizer)
        self._backward(batch)
        meter.stepping()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return meter.end(0, self.model) or 0

    def _backward(self, batch: Batch) -> None:
        with self.precision():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)

    def calibrate(self, batch: Batch) -> MemoryModel:
        """What plans cost here; no signals are read in a benchmark."""
        with self.precision():
            return calibrate(self.model, self.targets, batch, self.optimizer, signal_bytes=False)
