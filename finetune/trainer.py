"""The model and the Trainer of a fine-tune, as its settings describe them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available

from ..data.batches import IGNORED
from ..data.models import adapt, load_model
from ..data.workload import Texts, Workload, load_workload
from ..errors import ConfigError, UnsupportedError
from ..lora.ladder import REFERENCE_RANK
from ..lora.scaling import choose_scaling
from ..lora.targets import find_target_modules
from ..memory.find_configuration import check_length
from ..memory.training_step import check_checkpointing, check_installed
from .config import FinetuneConfig
from .metrics import LossInProgressBar
from .trainer_settings import new_arguments


def check_possible(config: FinetuneConfig) -> None:
    """Refuse settings that this machine cannot run.

    Raises:
        UnsupportedError: there are several processes, the library of the optimiser or of the quantisation is missing,
            or the GPU does not compute in bfloat16.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            "A fine-tune from the command line runs in one process. With several, use RankPilotCallback in a script of "
            "your own, as examples/several_processes.py does."
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
