"""The model and the Trainer of a fine-tune, as its settings describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import is_torch_bf16_gpu_available

from ..data.models import adapt, check_length, load_model
from ..data.tokens import IGNORED
from ..data.workload import Workload
from ..errors import UnsupportedError
from ..memory.budget import REFERENCE_RANK
from ..memory.step_config import OptimizerName
from ..memory.step_parts import CHECKPOINTING, check_installed
from .config import FinetuneConfig
from .metrics import LossInProgressBar

OPTIMIZERS: dict[OptimizerName, str] = {
    "adamw": "adamw_torch_fused",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "adamw8bit": "adamw_bnb_8bit",
}
"""Optimisers by the Trainer's names."""


def check_possible(config: FinetuneConfig) -> None:
    """Refuse settings that this machine cannot run.

    Raises:
        UnsupportedError: the library of the optimiser or of the quantisation is missing, or the GPU does not compute in
            bfloat16.
    """
    check_installed(config.optimizer, config.quantization)
    if config.bf16 and torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        raise UnsupportedError("This GPU does not compute in bfloat16. Leave --bf16 out.")


def new_model(config: FinetuneConfig, workload: Workload) -> PeftModel:
    """The same model for both runs: base, fresh adapters and head depend on the seed alone."""
    set_seed(config.seed)
    base = load_model(config.model, workload.task, workload.labels, workload.tokenizer, config.quantization)
    check_length(config.max_length, base)
    return adapt(
        base,
        config.model,
        workload.task,
        target_modules=config.target_modules,
        rank=REFERENCE_RANK,
        scaling=config.scaling,
    )


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
    trainer = Trainer(
        model=model,
        args=_arguments(config, folder),
        train_dataset=workload.train,
        eval_dataset=workload.held_out,
        data_collator=workload.collator,
        processing_class=workload.tokenizer,
        compute_metrics=_accuracy if workload.task in ("classification", "token-classification") else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInProgressBar)
    # Losses of both runs in the same unit, whatever the model does with the Trainer's token counts.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def _arguments(config: FinetuneConfig, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        bf16=config.bf16,
        use_cpu=config.bf16 and not torch.cuda.is_available(),  # or the Trainer refuses bf16 where there is no GPU
        optim=OPTIMIZERS[config.optimizer],
        per_device_eval_batch_size=64,
        learning_rate=config.learning_rate,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_steps=config.eval_every,
        save_total_limit=2,
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=False,  # or quiet logging would turn the bar off
        report_to=[],
        **(_checkpointing() if config.checkpointing else {}),
    )


def _checkpointing() -> dict[str, Any]:
    """Arguments that switch gradient checkpointing on; transformers 5.20 gave them another name."""
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": CHECKPOINTING}


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counted = prediction.label_ids != IGNORED
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids)[counted].mean())}
