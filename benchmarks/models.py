"""Random models, their LoRA settings and random batches: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.arrays import IntArray
from rankpilot.cost.batch_shape import Batch
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.record.model_states import state_bytes
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.lora.targets import TargetModule, find_target_modules
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from .harness import clock_for

Family = Literal["llama", "bert", "gpt2", "t5"]
FAMILIES: tuple[Family, ...] = ("bert", "llama")
"""Families whose steps are timed at a realistic size."""

ARCHITECTURES: dict[Family, tuple[type[PreTrainedConfig], Callable[[Any], PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "bert": (BertConfig, BertForSequenceClassification),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "t5": (T5Config, T5ForConditionalGeneration),
}

_ALL_LINEAR = {"r": REFERENCE_RANK, "lora_alpha": 2 * REFERENCE_RANK, "target_modules": "all-linear"}
LORA: dict[Family, dict[str, Any]] = {
    "llama": {**_ALL_LINEAR, "task_type": "CAUSAL_LM"},
    "bert": {**_ALL_LINEAR, "task_type": "SEQ_CLS"},
    "gpt2": {**_ALL_LINEAR, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "t5": _ALL_LINEAR,
}
"""Fields of each family's `peft.LoraConfig`: LoRA of rank 8 on all linear modules."""


@dataclass(frozen=True)
class Size:
    """Size of a model and of its batches.

    Attributes:
        layers: transformer layers.
        width: hidden width; heads are 32 (BERT) and 64 (others) wide, or as wide as the model if that is narrower.
        vocabulary: tokens; few, so that Llama's head does not outweigh its layers.
        rows: rows of a batch.
        length: tokens of a row.
    """

    layers: int = 6
    width: int = 384
    vocabulary: int = 4096
    rows: int = 16
    length: int = 64


def random_model(family: Family, size: Size, seed: int, *, heads: int | None = None, **fields: Any) -> PreTrainedModel:
    """A model with random weights, the same ones for the same arguments.

    Args:
        family: which architecture.
        size: of the model.
        seed: of the weights.
        heads: of attention; without it as many as `Size.width` says.
        fields: further fields of the model's config.
    """
    config_class, model_class = ARCHITECTURES[family]
    heads = heads or max(1, size.width // (32 if family == "bert" else 64))
    # Llama's three projections of 8/3 of the width are as large as BERT's two of four times the width.
    inner = 4 * size.width if family == "bert" else 8 * size.width // 3
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": size.length,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "t5":
        shape |= {"d_kv": size.width // heads, "d_ff": inner, "num_decoder_layers": size.layers}
        shape["decoder_start_token_id"] = 0
    elif family != "gpt2":
        shape["intermediate_size"] = inner
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**shape | fields))


def random_loader(family: Family, size: Size, seed: int, batches: int = 8) -> DataLoader[Any]:
    """A loader of so many batches of random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    count = batches * size.rows
    tokens = torch.randint(size.vocabulary, (count, size.length), generator=generator)
    labels = torch.randint(2, (count,), generator=generator) if family == "bert" else tokens
    rows: Any = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
        for ids, label in zip(tokens, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=size.rows)


LEARNING_RATE = 1e-3


class Learner:
    """LoRA under fused AdamW, in the order of transformers' Trainer: gradients are freed after the step.

    Other methods are this loop with work of their own at the places where the Trainer has events.

    Args:
        base: the model, on its device; adapters are put into it.
        config: of the adapters.
        seed: of the adapters.
        autocast: run forward passes in bfloat16 autocast.

    Attributes:
        model: the PEFT model, in training mode.
        parameters: all that trains.
        optimizer: of these.
        steps: optimiser steps done.
        own_seconds: for each step, the time that the method's own work at the events took: CPU time on a CPU, and the
            host's time beside another device.
        setup_seconds: what the method took before the first step.
    """

    def __init__(self, base: PreTrainedModel, config: LoraConfig, *, seed: int = 0, autocast: bool = False) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(base, config).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Fused, without decay: the Trainer's defaults.
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        # A hook, so that the meter of a step counts it.
        self.optimizer.register_step_post_hook(lambda *_: self._own(self.on_optimizer_step))
        self.steps: int = 0
        self.own_seconds: list[float] = []
        self.setup_seconds: float = 0.0
        self._device, self._seed, self._autocast = base.device, seed, autocast
        self._clock = clock_for(base.device)

    @cached_property
    def targets(self) -> list[TargetModule]:
        """The target modules."""
        return find_target_modules(self.model)

    def set_ranks(self, ranks: Sequence[int] | IntArray) -> IntArray:
        """Give each module its rank, or the most that it can have; returns the ranks, int64 (modules,)."""
        plan = {target.name: int(rank) for target, rank in zip(self.targets, ranks, strict=True)}
        set_ranks(self.targets, plan, self.optimizer, seed=self._seed)
        return np.array([target.rank for target in self.targets], dtype=np.int64)

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()

    def calibrate(self, batch: Batch) -> MemoryModel:
        """What plans cost here; no signals are read in a benchmark."""
        with self.precision():
            return calibrate(self.model, self.targets, batch, self.optimizer, signal_bytes=False)

    def step(self, batch: Batch) -> None:
        """One whole training step, on a batch on the model's device."""
        self.own_seconds.append(0.0)
        self._own(self.on_step_begin)
        with self.precision():
            loss = self.model(**batch).loss
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._own(self.on_pre_optimizer_step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self._own(self.on_step_end)

    def measured_step(self, batch: Batch) -> int:
        """The same, with its peak measured; returns bytes."""
        meter = PeakMeter()
        meter.begin(self.model, self.optimizer, self.buffer_bytes())
        self.step(batch)
        return meter.end(self.steps) or 0

    def _own(self, event: Callable[[], None]) -> None:
        start = self._clock()
        event()
        self.own_seconds[-1] += self._clock() - start

    def on_step_begin(self) -> None:
        """Before the forward pass."""

    def on_pre_optimizer_step(self) -> None:
        """Gradients are there, and clipped."""

    def on_optimizer_step(self) -> None:
        """The optimiser has stepped; gradients are still there."""

    def on_step_end(self) -> None:
        """Gradients are gone, and `steps` counts this step."""

    def ranks(self) -> tuple[int, ...]:
        """Current rank of each module; empty where no event changes it."""
        return ()

    def buffer_bytes(self) -> int:
        """Bytes that the method holds beside weights, gradients and the optimiser's state."""
        return 0

    def held_bytes(self) -> int:
        """Bytes of all that trains, as allocated now: weights, gradients, optimiser state, the method's buffers."""
        return state_bytes(self.model, self.optimizer) + self.buffer_bytes()
