"""The model and the Trainer of a fine-tune, its arguments, and its metrics."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available

from ..common.devices import EnergyCounter
from ..common.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    RankPilotError,
    UnknownNameError,
    UnsupportedError,
    first_line,
    install,
    shown,
)
from ..common.files import append_json_line, parse_json, read_json_lines, write_text
from ..cost.budget import free_bytes
from ..cost.forecast.published import most_positions
from ..cost.record.peak_meter import PeakMeter
from ..cost.step_config import OptimizerName, check_length
from ..cost.training_step import CHECKPOINTING, check_checkpointing, check_installed
from ..data.models import adapt, load_model, with_sizes
from ..data.task import Task
from ..data.workload import Workload, load_workload
from ..lora.peft_config import choose_scaling
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import find_target_modules
from .options import FinetuneConfig
from .plan_rate import rate_by_rule
from .streaming import stream_what_is_too_large

logger = logging.getLogger(__name__)

_PROCESSORS = Path("/proc/cpuinfo")


class RunMetrics(TrainerCallback):  # type: ignore[misc]
    """Writes the curves of a run as JSON lines, and measures its time and energy, from the creation of this object.

    Args:
        path: the file; a resumed run appends to it.
        meter: measures peaks in a run without RankPilotCallback, which measures them itself.
        energy: counter of the device; None if the hardware has none.

    Attributes:
        step_s: seconds of each step, including those before a resume.
    """

    meter: PeakMeter | None
    path: Path
    energy: EnergyCounter | None

    def __init__(self, path: Path, meter: PeakMeter | None = None, energy: EnergyCounter | None = None) -> None:
        self.path, self.meter, self.energy = path, meter, energy
        self.step_s: list[float] = []
        self._written = 0
        self._evaluated: set[int] = set()
        self._started = 0.0
        self._made, self._before_s = time.perf_counter(), 0.0
        self._joules_made, self._before_joules = energy.joules() if energy else 0.0, 0.0

    @property
    def train_s(self) -> float:
        """Seconds taken by the run, including those before a resume."""
        return self._before_s + time.perf_counter() - self._made

    @property
    def energy_joules(self) -> float | None:
        """Energy used by the device since the start, including before a resume; None if not counted."""
        return self._before_joules + self.energy.joules() - self._joules_made if self.energy else None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **objects: Any) -> None:
        """Delete rows written after the last checkpoint of an interrupted run, and continue its times."""
        rows = [row for row in read_json_lines(self.path) if 0 < row["step"] <= state.global_step]
        if self.meter is None:  # RankPilotCallback knows all peaks of the run, written at its end
            rows = [row for row in rows if "peak_bytes" not in row]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.step_s = [seconds for row in rows for seconds in row.get("step_s", ())]
        self._written = len(self.step_s)
        self._before_s = max((row.get("train_s", 0.0) for row in rows), default=0.0)
        self._before_joules = max((row.get("energy_joules") or 0.0 for row in rows), default=0.0)
        if self.meter and state.global_step > 0:  # as in an uninterrupted run
            self.meter.requested = False
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **objects: Any) -> None:
        """Start the clock, and measure this step if due."""
        if self.meter and self.meter.due(state.global_step):
            self.meter.begin(objects["model"], objects["optimizer"])
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **objects: Any) -> None:
        """Stop the clock, and write the peak if measured."""
        self.step_s.append(time.perf_counter() - self._started)
        peak = self.meter.end(state.global_step) if self.meter else None
        if peak is not None:
            append_json_line(self.path, {"step": state.global_step, "peak_bytes": peak})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        """Write losses, accuracies and times; one evaluation per step.

        Raises:
            NonFiniteError: the gradient is unexpectedly NaN or infinite.
        """
        norm = (logs or {}).get("grad_norm", 0.0)
        # In float16 the scaler skips such steps, and lowers its factor; RankPilotCallback checks itself.
        if self.meter and not math.isfinite(float(norm)) and not args.fp16:
            raise NonFiniteError(
                f"The gradient norm is {norm} at step {state.global_step}: training diverged. Lower --learning-rate."
            )
        kept: dict[str, Any] = {
            key: float(value) for key, value in (logs or {}).items() if key in ("loss", "eval_loss", "eval_accuracy")
        }
        if "loss" in kept:
            kept |= {"step_s": self.step_s[self._written :], "train_s": self.train_s}
            kept |= {"energy_joules": self.energy_joules} if self.energy else {}
            self._written = len(self.step_s)
        elif kept and state.global_step in self._evaluated:
            return
        if "eval_loss" in kept:
            self._evaluated.add(state.global_step)
        if kept:
            append_json_line(self.path, {"step": state.global_step, **kept})


class LossInProgressBar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar, showing the latest losses instead of printing a line per log."""

    def on_log(self, *event: Any, logs: dict[str, float] | None = None, **objects: Any) -> None:
        """Show the latest losses."""
        if self.training_bar is not None and logs:
            shown = {key: f"{float(logs[key]):.4f}" for key in ("loss", "eval_loss") if key in logs}
            self.training_bar.set_postfix(shown, refresh=False)


def hardware_facts(device: torch.device) -> dict[str, Any]:
    """Return name, utilization, and free and total memory in bytes of a device, as JSON values.

    The utilization is that of all cores over the last minute; for a GPU as reported by the driver, or None.

    Args:
        device: the device of the run.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total, busy = properties.name, int(properties.total_memory), _busy_gpu(device)
    else:
        cores = psutil.cpu_count() or 1
        name, total = f"{_processor()}, {cores} cores", int(psutil.virtual_memory().total)
        busy = min(psutil.getloadavg()[0] / cores, 1.0)
    return {"device": name, "busy": busy, "free_bytes": free_bytes(device), "total_bytes": total}


def _busy_gpu(device: torch.device) -> float | None:
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # torch asks NVIDIA's library, which may be absent or refuse
        return None


def _processor() -> str:
    """Return the name of the processor on Linux; elsewhere its type."""
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


OPTIMIZERS: dict[OptimizerName, str] = {
    "adamw": "adamw_torch_fused",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "adamw8bit": "adamw_bnb_8bit",
    "paged_adamw8bit": "paged_adamw_8bit",
}
"""Optimizers by the Trainer's names."""

_OPTIONS = (
    "max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "learning_rate bf16 gradient_checkpointing max_length seed eval_steps load_best_model_at_end report_to"
)
DECIDED = {name: f"--{name.replace('_', '-')}" for name in _OPTIONS.split()} | {
    "output_dir": "--output",
    "activation_checkpointing": "--gradient-checkpointing",
    **dict.fromkeys(("eval_strategy", "save_strategy", "save_steps"), "--eval-steps"),
}
"""Arguments set by an option of rankpilot, and that option."""


def check_possible(config: FinetuneConfig) -> None:
    """Reject settings that this machine cannot run.

    Raises:
        UnsupportedError: the library of the optimizer or of the quantization is missing, or the GPU does not support
            bfloat16.
    """
    check_installed(config.optimizer, config.quantization)
    if config.bf16 and torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        raise UnsupportedError("This GPU does not support bfloat16. Drop --bf16.")


def started_processes() -> int:
    """Return the number of processes started by a launcher such as torchrun, from its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_workload(config: FinetuneConfig, tell: Callable[[str], None]) -> tuple[FinetuneConfig, Workload]:
    """Return the settings of a fine-tune, with the sizes of its task filled in, and its data.

    `tell` is called with a short description of each phase.

    Raises:
        UnsupportedError: see `check_possible`.
        UnknownNameError, AssetError, DataError, ConfigError: see `load_workload`.
    """
    check_possible(config)
    tell(f"loading {config.model} and {config.data}")
    workload = load_workload(
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
    return with_sizes(config, config.model, workload.task), workload


def new_model(config: FinetuneConfig, workload: Workload) -> PeftModel:
    """Create the same model for all runs: base, fresh adapters and head depend on the seed alone.

    Raises:
        UnknownNameError, AssetError, ConfigError: there is no such model, or it does not fit the task or the length.
        UnsupportedError: gradient checkpointing is requested, and the model has none.
    """
    set_seed(config.seed)
    kind = workload.task, workload.labels, workload.tokenizer
    base = load_model(config.model, *kind, config.quantization, config.prepare_kbit)
    check_length(config.max_length, most_positions(base))
    if config.gradient_checkpointing is True:
        check_checkpointing(base)
    options: dict[str, Any] = {
        "r": REFERENCE_RANK,
        "lora_alpha": config.alpha,
        "use_rslora": config.scaling == "rslora",
    }
    options |= {"target_modules": config.target_modules, "target_parameters": config.target_parameters}
    model = adapt(base, config.model, workload.task, **options)
    choose_scaling(find_target_modules(model), config.kept)
    return model


_TO_BE_RULED = 1e-3
"""Placeholder rate of arguments created before the model, if the rule sets it."""


def new_trainer(
    config: FinetuneConfig,
    workload: Workload,
    model: PeftModel,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Create a Trainer that evaluates and saves every `eval_every` steps.

    Args:
        config: the settings of the fine-tune.
        workload: the training and evaluation texts.
        model: from `new_model`.
        folder: the folder of checkpoints.
        callbacks: callbacks in addition to the progress bar.
    """
    arguments = new_arguments(config, workload.task, folder)
    if config.early_stopping is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(config.early_stopping)]
    stream_what_is_too_large(model, arguments.device, config)
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": workload.train,
        "eval_dataset": workload.held_out,
        "data_collator": workload.collator,
        "processing_class": workload.tokenizer,
        "callbacks": callbacks,
    }
    if workload.task == "causal-lm":
        trainer = _sft_trainer(common)
    else:
        trainer = Trainer(**common, compute_metrics=_accuracy)
        # Losses of both runs in the same unit, whatever the model does with the Trainer's token counts.
        trainer.model_accepts_loss_kwargs = False
    if isinstance(config.learning_rate, str):
        rows = config.batch_size * config.accumulation * arguments.world_size
        batches = -(-len(trainer.train_dataset) // rows)
        steps = config.steps if config.epochs is None else max(1, math.ceil(config.epochs * batches))
        trainer.args.learning_rate = rate_by_rule(trainer.model, find_target_modules(trainer.model), steps)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInProgressBar)
    return trainer


def _sft_trainer(common: dict[str, Any]) -> Trainer:
    """Create TRL's SFTTrainer, which reads conversations itself; plain texts come as blocks of full length.

    Raises:
        ConfigError: TRL rejects model, rows or settings.
        DataError: it leaves no row.
    """
    from trl import SFTTrainer

    try:
        trainer: Trainer = SFTTrainer(**common)
    except (RankPilotError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # TRL, datasets and templates pass on what rows raise
        raise ConfigError(f"TRL's SFTTrainer cannot train with this: {first_line(error)}") from error
    given, kept = len(common["train_dataset"]), len(trainer.train_dataset)
    told = f"TRL's SFTTrainer leaves out {given - kept} of {given} rows: nothing to learn is left within max_length"
    if not kept:
        raise DataError(f"{told}, or they are no lists of messages with role and content. Raise --max-length.")
    if kept < given and not common["args"].packing:
        logger.warning("%s.", told)
    return trainer


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def arguments_class(task: Task) -> type[TrainingArguments]:
    """Return the class of the Trainer's arguments: TRL's for language models, transformers' for classification.

    Raises:
        UnsupportedError: TRL is not installed.
    """
    kind: type[TrainingArguments] = TrainingArguments
    if task != "causal-lm":
        return kind
    if find_spec("trl") is None:
        raise UnsupportedError(f"Fine-tuning a causal language model requires TRL: {install('trl')}.")
    from trl import SFTConfig

    kind = SFTConfig
    return kind


def new_arguments(config: FinetuneConfig, task: Task, folder: Path) -> TrainingArguments:
    """Create the Trainer's arguments.

    Args:
        config: the settings of the fine-tune.
        task: the task of the model.
        folder: the folder of checkpoints.

    Raises:
        UnknownNameError, ConfigError: a further setting is unknown, belongs to an option of rankpilot, or is invalid.
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
        # Without a GPU, the Trainer otherwise rejects bf16, and joins no processes.
        "use_cpu": (config.bf16 or started_processes() > 1) and not torch.cuda.is_available(),
        "optim": OPTIMIZERS[config.optimizer],
        "learning_rate": _TO_BE_RULED if isinstance(config.learning_rate, str) else config.learning_rate,
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
        **_checkpointing(config.gradient_checkpointing is True),
    }
    for tracker in config.report_to:
        if tracker not in (allowed := (*INTEGRATION_TO_CALLBACK, "all", "none")):
            raise UnknownNameError.of("tracker", tracker, allowed)
        try:
            INTEGRATION_TO_CALLBACK.get(tracker, object)()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(f"Cannot use tracker {tracker!r}: {first_line(error)}") from error
    if task == "causal-lm":
        values["max_length"] = config.max_length
    try:
        return kind(**values | further)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"The Trainer rejects these settings: {first_line(error)}") from error


def further_settings(given: tuple[str, ...], kind: type[TrainingArguments]) -> dict[str, Any]:
    """Parse settings of the Trainer's arguments from NAME=VALUE; a value is read as JSON, or else as text.

    Raises:
        UnknownNameError, ConfigError: a name is unknown or belongs to an option of rankpilot, or there is no value.
    """
    usual = {field.name: field.default for field in fields(kind)}
    values: dict[str, Any] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not equals:
            raise ConfigError(f"A Trainer setting must have the form NAME=VALUE; got {entry!r}.")
        if name in DECIDED:
            raise ConfigError(f"{name} is set by {DECIDED[name]}; use that instead of {entry!r}.")
        if name not in usual:
            raise UnknownNameError.of(f"setting of {kind.__name__}", name, usual)
        try:
            values[name] = parse_json(text)
        except ValueError:
            values[name] = text
        if isinstance(usual[name], int | float) and isinstance(values[name], str | list | dict):
            raise ConfigError(f"{name} must be a number, true or false; got {shown(entry)}.")
    return values


def _checkpointing(wanted: bool) -> Mapping[str, Any]:
    """Return arguments that switch gradient checkpointing on or off, renamed in transformers 5.20."""
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": CHECKPOINTING} if wanted else {name: False}
