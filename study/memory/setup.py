"""The model, adapter, batch and optimiser that `rankpilot memory` looks at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from ...common.devices import find_device
from ...data.batches import largest_batch
from ...data.models import adapt, check_length, load_config, load_model
from ...data.task import Task
from ...data.workload import load_workload
from ...errors import ConfigError
from ...lora.resize import set_ranks
from ...lora.targets import TargetModule, find_target_modules
from ...memory.batch_shape import map_tensors
from ...memory.for_training import measure_memory
from ...memory.model import MemoryModel
from ...memory.step_parts import new_optimizer
from ...memory.training_step import TrainingStep, model_loss
from .config import MemoryConfig

Batch = dict[str, torch.Tensor]
Tell = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class StepSetup:
    """One training step, ready to run.

    Attributes:
        config: what was asked for.
        task: the task of the model's head.
        model: with adapters of the rank that was asked for, in training mode, on its device.
        targets: its target modules.
        batch: the largest batch that training would see.
        optimizer: the optimiser of all parameters that train.
    """

    config: MemoryConfig
    task: Task
    model: PeftModel
    targets: list[TargetModule]
    batch: Batch
    optimizer: torch.optim.Optimizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.targets[0].weight_a.device

    def precision(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    def measure_memory(self, batch: Batch | None = None) -> MemoryModel:
        """The byte model of this step as it is set up now, without signal buffers; on the largest batch, or another."""
        step = TrainingStep(
            self.model, model_loss(self.model), self.optimizer, accumulates=self.config.accumulation > 1
        )
        with self.precision():
            return measure_memory(step, self.targets, batch or self.batch, signals=False)


def set_up(config: MemoryConfig, tell: Tell) -> StepSetup:
    """Load the model and the data that a configuration names, and make the adapter, the batch and the optimiser.

    `tell` is called with a few words on what happens next.

    Raises:
        UnknownNameError, AssetError, DataError: there is no such model or data, or the data cannot be used.
        ConfigError: the rows are longer than the model's positions, or no module can be adapted.
        UnsupportedError: the adapter or the optimiser cannot be handled.
    """
    tell(f"loading {config.model}")
    architecture = load_config(config.model)
    workload = None
    task = config.task or default_task(architecture)
    labels = tuple(f"class {number}" for number in range(1 if task == "regression" else config.labels))
    if config.data is not None:
        names = ("task", "max_length", "text_column", "label_column", "seed")
        workload = load_workload(config.model, config.data, **{name: getattr(config, name) for name in names})
        task, labels = workload.task, workload.labels
    set_seed(config.seed)
    tokenizer = workload.tokenizer if workload else None
    base = load_model(config.model, task, labels, tokenizer, config.quantization)
    base.config.use_cache = False  # as in the Trainer
    check_length(config.max_length, base)
    device = find_device()
    model = adapt(base, config.model, task, target_modules=config.target_modules, rank=1, scaling=2.0)
    model = model.to(device).train()
    targets = find_target_modules(model)
    widest = max(target.max_rank for target in targets)
    if config.rank > widest:
        raise ConfigError(f"No module has a rank above {widest}, the smaller width of the widest; got {config.rank}.")
    set_ranks(targets, {target.name: min(config.rank, target.max_rank) for target in targets}, seed=config.seed)
    if workload:
        largest = largest_batch(workload.train, workload.collator, config.batch_size)
        batch = map_tensors(largest, lambda tensor: tensor.to(device))
    else:
        batch = {name: tensor.to(device) for name, tensor in _random_batch(config, base.config, task).items()}
    return StepSetup(config, task, model, targets, batch, new_optimizer(config.optimizer, model))


def default_task(config: Any) -> Task:
    """The task that a model with this configuration is usually fine-tuned for.

    The name of its head decides. If it names none, models that only read from left to right generate.
    """
    for architecture in config.architectures or ():
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        if architecture.endswith("ForSequenceClassification"):
            return "classification"
        if architecture.endswith("ForTokenClassification"):
            return "token-classification"
        if architecture.endswith("ForConditionalGeneration") and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return "seq2seq"
    kind = type(config)
    reads_one_way = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return "causal-lm" if reads_one_way else "classification"


def _random_batch(config: MemoryConfig, model_config: Any, task: Task) -> Batch:
    """Full rows of ordinary token ids, without ids that the model reads as padding or as an end."""
    text = model_config.get_text_config()
    special: set[int] = set()
    for name in ("pad", "bos", "eos", "sep", "cls", "decoder_start"):
        special.update(np.atleast_1d(getattr(text, f"{name}_token_id", None) or 0).tolist())
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.max_length)
    tokens = ordinary[torch.randint(len(ordinary), shape, generator=generator)]
    if model_config.is_encoder_decoder and task != "seq2seq" and text.eos_token_id is not None:
        tokens[:, 0] = text.eos_token_id  # such classifiers look for one; shorter rows keep the first token
    labels = {
        "classification": torch.arange(config.batch_size) % config.labels,
        "regression": torch.linspace(0, 1, config.batch_size),
        "token-classification": tokens % config.labels,
    }
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels.get(task, tokens.clone()),
    }
