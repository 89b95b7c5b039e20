"""A real fine-tune under a policy, beside a uniform-rank run with the same seed, batches and budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available

from ..agents.learned.policy_file import load_policy
from ..allocation.plan import check_budget, uniform_ranks
from ..allocation.problem import AllocationProblem
from ..common.files import append_json_line, read_json, read_json_lines, write_json
from ..common.run_folder import open_run
from ..common.settings import as_json
from ..data.batches import largest_batch
from ..data.models_and_data import Workload, adapt, load_model, load_workload
from ..errors import UnsupportedError
from ..lora.peft_config import adapter_ranks, make_resizable, sync_config
from ..lora.resize import set_ranks
from ..lora.targets import TargetModule, find_target_modules
from ..memory.budget import REFERENCE_RANK, Budget
from ..memory.for_training import price_plans
from ..memory.peak_meter import PeakMeter
from ..memory.step_config import OptimizerName
from ..memory.step_parts import CHECKPOINTING, check_installed, checkpoint_segments, new_optimizer
from .before_training import precision, undisturbed
from .callback import RankPilotCallback
from .checkpoint import is_complete
from .config import FinetuneConfig
from .metrics import LossInProgressBar, RunMetrics
from .reload_check import check_reload

PILOT, UNIFORM = "rankpilot", "uniform"

OPTIMIZERS: dict[OptimizerName, str] = {
    "adamw": "adamw_torch_fused",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "adamw8bit": "adamw_bnb_8bit",
}
"""Optimisers by the Trainer's names."""

MEASURE_EVERY = 10
"""Steps from one measured peak to the next: the report draws them. A measured step takes about 1.15 of a plain one."""


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def _new_model(config: FinetuneConfig, workload: Workload) -> PeftModel:
    """The same model for both runs: base, fresh adapters and head depend on the seed alone."""
    set_seed(config.seed)
    base = load_model(config.model, workload.task, workload.labels, workload.tokenizer)
    return adapt(
        base,
        config.model,
        workload.task,
        target_modules=config.target_modules,
        rank=REFERENCE_RANK,
        scaling=config.scaling,
    )


def _trainer(
    config: FinetuneConfig,
    workload: Workload,
    model: PeftModel,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    args = TrainingArguments(
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
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=workload.train,
        eval_dataset=workload.held_out,
        data_collator=workload.collator,
        processing_class=workload.tokenizer,
        compute_metrics=_accuracy if workload.task == "classification" else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInProgressBar)
    # Losses of both runs in the same unit, whatever the model does with the Trainer's token counts.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def _checkpointing() -> dict[str, Any]:
    """Arguments that switch gradient checkpointing on; transformers 5.20 gave them another name."""
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": CHECKPOINTING}


def last_complete_checkpoint(folder: Path, *, piloted: bool) -> str | None:
    """The latest checkpoint that was written to its end; None if there is none."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        if is_complete(path) if piloted else (path / "trainer_state.json").is_file():
            return str(path)
    return None


def _uniform_budget(config: FinetuneConfig, folder: Path) -> Budget:
    """The budget of the run under the policy, in bytes where it was what was free at that time."""
    budget = Budget.parse(config.budget)
    if budget.kind != "auto":
        return budget
    return Budget("bytes", read_json(folder / f"result-{PILOT}.json")["budget_bytes"])


def _uniform_start(
    config: FinetuneConfig, budget: Budget, workload: Workload, trainer: Trainer, model: PeftModel
) -> float:
    """Give the uniform run the largest equal ranks that fit the budget; returns the limit."""
    targets = find_target_modules(model)
    make_resizable(model, targets)
    model.train()
    if config.checkpointing:
        checkpoint_segments(model.get_base_model())
    # AdamW's state is what is counted without an optimiser; another one is made for its sizes alone.
    optimizer = None if config.optimizer == "adamw" else new_optimizer(config.optimizer, model)
    accumulates = config.accumulation > 1
    with undisturbed(), precision(trainer.args):
        batch = largest_batch(workload.train, trainer.data_collator, config.batch_size, trainer.args.device)
        prices = price_plans(budget, targets, model, batch, optimizer, signals=False, accumulates=accumulates)
    problem = AllocationProblem.of(targets, prices.cost, prices.limit.value)
    check_budget(problem, [target.name for target in targets])
    ranks = uniform_ranks(problem).tolist()
    set_ranks(targets, dict(zip((t.name for t in targets), ranks, strict=True)), seed=config.seed)
    sync_config(model, targets)
    return prices.limit.value


def run_one(config: FinetuneConfig, workload: Workload, folder: Path, name: str) -> dict[str, Any]:
    """Run one fine-tune to its end, from its last complete checkpoint if there is one; returns its figures."""
    result_path = folder / f"result-{name}.json"
    if result_path.exists():
        stored: dict[str, Any] = read_json(result_path)
        return stored
    model = _new_model(config, workload)
    piloted = name == PILOT
    pilot = None
    if piloted:
        pilot = RankPilotCallback(config.policy, config.budget, log=folder / "decisions", measure_every=MEASURE_EVERY)
    metrics = RunMetrics(folder / f"metrics-{name}.jsonl", None if pilot else PeakMeter(MEASURE_EVERY))
    trainer = _trainer(config, workload, model, folder / name, [pilot, metrics] if pilot else [metrics])
    limit = 0.0 if pilot else _uniform_start(config, _uniform_budget(config, folder), workload, trainer, model)
    started = time.monotonic()
    set_seed(config.seed)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / name, piloted=piloted))
    train_s = time.monotonic() - started
    held_out = trainer.evaluate()
    if pilot:
        for step, peak in pilot.peaks:
            append_json_line(metrics.path, {"step": step, "peak_bytes": peak})
    # From the file: a run that was killed after its last step measures nothing when it goes on.
    peaks = [row["peak_bytes"] for row in read_json_lines(metrics.path) if "peak_bytes" in row]
    targets = find_target_modules(model)
    model.save_pretrained(folder / name / "adapter")
    result = {
        "held_out_loss": held_out["eval_loss"],
        "held_out_accuracy": held_out.get("eval_accuracy"),
        "adapter_parameters": _adapter_parameters(targets),
        "peak_bytes": max(peaks),
        "budget_bytes": float(pilot.controller.limit) if pilot and pilot.controller else limit,
        "median_step_s": float(np.median(metrics.step_s)) if metrics.step_s else None,
        "train_s": train_s,
        "ranks": adapter_ranks(targets),
    }
    if pilot:
        result["reload"] = check_reload(config, workload, model, folder / name / "adapter")
    write_json(result_path, result)
    return result


def _adapter_parameters(targets: list[TargetModule]) -> int:
    return sum(target.rank * (target.d_in + target.d_out) for target in targets)


def finetune(
    config: FinetuneConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_phase: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a fine-tune under a policy, and the uniform run if asked for; returns what `summary.json` holds.

    Args:
        config: what to run.
        folder: the run's folder.
        resume: go on with an interrupted run; finished parts are not repeated.
        on_phase: told in a few words what is about to happen.

    Raises:
        RunFolderError: see `open_run`.
        UnknownNameError, AssetError, DataError, PolicyFileError, BudgetError, UnsupportedError: bad input, before any
            training.
    """
    tell = on_phase or (lambda text: None)
    policy = load_policy(config.policy)
    check_installed(config.optimizer)
    if config.bf16 and torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        raise UnsupportedError("This GPU does not compute in bfloat16. Leave --bf16 out.")
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
    with open_run(folder, as_json(FinetuneConfig, config), resume=resume, kind=FinetuneConfig):
        runs = {}
        for name in (PILOT, UNIFORM) if config.compare_uniform else (PILOT,):
            tell(f"fine-tuning under {policy.name}" if name == PILOT else "fine-tuning with uniform ranks")
            runs[name] = run_one(config, workload, folder, name)
        summary = {
            "model": config.model,
            "data": config.data,
            "policy": policy.name,
            "seed": config.seed,
            "steps": config.steps,
            "runs": runs,
            "reload": runs[PILOT].pop("reload"),
        }
        write_json(folder / "summary.json", summary)
    return summary
