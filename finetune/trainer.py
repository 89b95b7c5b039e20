"""The model and the Trainer of a fine-tune, and the Trainer's arguments, as its settings describe them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available

from ..common.files import parse_json
from ..cost.find_configuration import check_length
from ..cost.step_config import OptimizerName
from ..cost.training_step import CHECKPOINTING, check_checkpointing, check_installed
from ..data.batches import IGNORED
from ..data.models import adapt, load_model
from ..data.task import Task
from ..data.workload import Texts, Workload, load_workload
from ..errors import ConfigError, UnknownNameError, UnsupportedError, first_line
from ..lora.peft_config import choose_scaling
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import find_target_modules
from .config import FinetuneConfig
from .metrics import LossInProgressBar

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


def check_possible(config: FinetuneConfig) -> None:
    """Refuse settings that this machine cannot run.

    Raises:
        UnsupportedError: there are several processes, the library of the optimiser or of the quantisation is missing,
            or the GPU does not compute in bfloat16.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            "A fine-tune from the command line runs in one process. With several, call `rankpilot.attach` in a script "
            "of your own, as examples/several_processes.py does."
        )
    check_installed(config.optimizer, config.quantization)
    if config.bf16 and torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        raise UnsupportedError("This GPU does not compute in bfloat16. Leave --bf16 out.")


def read_workload(config: FinetuneConfig, tell: Callable[[str], None]) -> Workload:
    """The data of a fine-tune; `tell` is called with a few words on what happens next.

    Raises:
        UnsupportedError: see `check_possible`.
        UnknownNameError, AssetError, DataError, ConfigError: see `load_workload`.
    """
    check_possible(config)
    tell(f"loading {config.model} and {config.data}")
    return load_workload(
        config.model,
        config.data,
        task=config.task,
        max_length=config.max_length,
        text_column=config.text_column,
        label_column=config.label_column,
        train_rows=config.train_rows,
        held_out_rows=config.held_out_rows,
        seed=config.seed,
    )


def new_model(config: FinetuneConfig, workload: Workload) -> PeftModel:
    """The same model for both runs: base, fresh adapters and head depend on the seed alone.

    Raises:
        UnknownNameError, AssetError, ConfigError: there is no such model, or it does not fit the task or the length.
        UnsupportedError: gradient checkpointing is asked for, and the model has none.
    """
    set_seed(config.seed)
    base = load_model(config.model, workload.task, workload.labels, workload.tokenizer, config.quantization)
    check_length(config.max_length, base)
    if config.checkpointing or config.recompute:
        check_checkpointing(base)
    options = {"r": REFERENCE_RANK, "lora_alpha": config.alpha, "use_rslora": config.scaling == "rslora"}
    model = adapt(base, config.model, workload.task, target_modules=config.target_modules, **options)
    choose_scaling(find_target_modules(model), config.kept)
    return model


def new_trainer(
    config: FinetuneConfig,
    workload: Workload,
    model: PeftModel,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Trainer that evaluates and saves every `eval_every` steps.

    Args:
        config: the settings of the fine-tune.
        workload: the texts to train and to evaluate on.
        model: from `new_model`.
        folder: where checkpoints go.
        callbacks: beside the progress bar.
    """
    arguments = new_arguments(config, workload.task, folder)
    if config.early_stopping is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(config.early_stopping)]
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": workload.train,
        "eval_dataset": workload.held_out,
        "data_collator": workload.collator,
        "processing_class": workload.tokenizer,
        "callbacks": callbacks,
    }
    if workload.texts is not None:
        trainer = _sft_trainer(workload.texts, common)
    else:
        kind = Seq2SeqTrainer if workload.task == "seq2seq" else Trainer
        has_classes = workload.task in ("classification", "token-classification")
        trainer = kind(**common, compute_metrics=_accuracy if has_classes else None)
        # Losses of both runs in the same unit, whatever the model does with the Trainer's token counts.
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInProgressBar)
    return trainer


def _sft_trainer(texts: Texts, common: dict[str, Any]) -> Trainer:
    """TRL's SFTTrainer. It applies the chat template itself; plain texts come as blocks of full length.

    Raises:
        ConfigError: TRL refuses model, texts or settings.
    """
    from trl import SFTTrainer

    if texts.is_chat:
        common |= {"train_dataset": texts.train, "eval_dataset": texts.held_out, "data_collator": None}
    try:
        trainer: Trainer = SFTTrainer(**common)
    except ValueError as error:
        raise ConfigError(f"TRL's SFTTrainer cannot train this: {error}") from error
    return trainer


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counted = prediction.label_ids != IGNORED
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids)[counted].mean())}


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


def _checkpointing(wanted: bool) -> Mapping[str, Any]:
    """Arguments that switch gradient checkpointing on or off; transformers 5.20 gave them another name."""
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": CHECKPOINTING} if wanted else {name: False}
