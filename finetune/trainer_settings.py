"""The arguments of a fine-tune's Trainer: those that the settings of rankpilot decide, and further ones by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..allocation.bounds import Bounds
from ..common.files import parse_json
from ..data.task import Task
from ..errors import ConfigError, UnknownNameError, UnsupportedError, first_line, shown
from ..memory.step_config import OptimizerName
from ..memory.training_step import CHECKPOINTING
from .config import FinetuneConfig

_RANK = re.compile(r"[0-9]{1,10}")

OPTIMIZERS: dict[OptimizerName, str] = {
    "adamw": "adamw_torch_fused",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "adamw8bit": "adamw_bnb_8bit",
    "paged_adamw8bit": "paged_adamw_8bit",
}
"""Optimisers by the Trainer's names."""

DECIDED = {
    "output_dir": "--output",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--eval-batch-size",
    "gradient_accumulation_steps": "--accumulation",
    "learning_rate": "--learning-rate",
    "bf16": "--bf16",
    "gradient_checkpointing": "--checkpointing",
    "activation_checkpointing": "--checkpointing",
    "max_length": "--max-length",
    "seed": "--seed",
    "eval_strategy": "--eval-every",
    "eval_steps": "--eval-every",
    "save_strategy": "--eval-every",
    "save_steps": "--eval-every",
    "load_best_model_at_end": "--best",
    "report_to": "--report-to",
}
"""Arguments that an option of rankpilot decides, and that option."""


def arguments_class(task: Task) -> type[TrainingArguments]:
    """The class of the Trainer's arguments: TRL's for models that continue a text, transformers' for all others.

    Raises:
        UnsupportedError: TRL is not installed.
    """
    kind: type[TrainingArguments] = Seq2SeqTrainingArguments if task == "seq2seq" else TrainingArguments
    if task != "causal-lm":
        return kind
    if find_spec("trl") is None:
        raise UnsupportedError("Fine-tuning a model that continues a text needs TRL: pip install 'rankpilot[trl]'.")
    from trl import SFTConfig

    kind = SFTConfig
    return kind


def new_arguments(config: FinetuneConfig, task: Task, folder: Path) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        config: the settings of the fine-tune.
        task: what the model learns.
        folder: where checkpoints go.

    Raises:
        UnknownNameError, ConfigError: a further setting is unknown, belongs to an option of rankpilot, or does not fit.
        UnsupportedError: see `arguments_class`.
    """
    kind = arguments_class(task)
    further = further_settings(config.trainer, kind)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": -1 if config.epochs else config.steps,
        "num_train_epochs": config.epochs or 1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "bf16": config.bf16,
        "use_cpu": config.bf16 and not torch.cuda.is_available(),  # or the Trainer refuses bf16 where there is no GPU
        "optim": OPTIMIZERS[config.optimizer],
        "learning_rate": config.learning_rate,
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": config.eval_every,
        "save_steps": config.eval_every,
        "save_total_limit": 2,
        "load_best_model_at_end": config.keeps_best,
        "metric_for_best_model": "eval_loss" if config.keeps_best else None,
        "seed": config.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": False,  # or quiet logging would turn the bar off
        "report_to": list(config.report_to),
        **_checkpointing(config.checkpointing),
    }
    for tracker in config.report_to:
        if tracker not in (allowed := (*INTEGRATION_TO_CALLBACK, "all", "none")):
            raise UnknownNameError.of("tracker", tracker, allowed)
        try:
            INTEGRATION_TO_CALLBACK.get(tracker, object)()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(f"The tracker {tracker!r} cannot be used: {first_line(error)}") from error
    if task == "causal-lm":
        values["max_length"] = config.max_length
    try:
        return kind(**values | further)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"The Trainer refuses these settings: {first_line(error)}") from error


def further_settings(given: tuple[str, ...], kind: type[TrainingArguments]) -> dict[str, Any]:
    """Settings of the Trainer's arguments from NAME=VALUE; a value is read as JSON, or else as text.

    Raises:
        UnknownNameError, ConfigError: a name is unknown or belongs to an option of rankpilot, or there is no value.
    """
    names = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not equals:
            raise ConfigError(f"A setting of the Trainer has the form NAME=VALUE; got {entry!r}.")
        if name in DECIDED:
            raise ConfigError(f"{name} is decided by {DECIDED[name]}: use that in place of {entry!r}.")
        if name not in names:
            raise UnknownNameError.of(f"setting of {kind.__name__}", name, names)
        try:
            values[name] = parse_json(text)
        except ValueError:
            values[name] = text
    return values


def rank_bounds_of(given: tuple[str, ...]) -> Bounds:
    """Bounds from MODULE=RANK or MODULE=LEAST:MOST.

    Raises:
        ConfigError: an entry has another form.
    """
    bounds: dict[str, int | tuple[int, int]] = {}
    for entry in given:
        name, _, text = entry.partition("=")
        numbers = text.split(":")
        if not name or len(numbers) > 2 or not all(_RANK.fullmatch(number) for number in numbers):
            raise ConfigError(
                f"A bound has the form MODULE=RANK or MODULE=LEAST:MOST, as q_proj=0:16; got {shown(entry)}."
            )
        ranks = [int(number) for number in numbers]
        bounds[name] = ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])
    return bounds


def _checkpointing(wanted: bool) -> Mapping[str, Any]:
    """Arguments that switch gradient checkpointing on or off; transformers 5.20 gave them another name."""
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": CHECKPOINTING} if wanted else {name: False}
