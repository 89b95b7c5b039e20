"""A real fine-tune under a policy, beside a uniform-rank run with the same seed, batches and budget."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..env.controller import REFERENCE_RANK
from ..errors import NonFiniteError, RunFolderError
from ..files import append_json_line, read_json, read_json_lines, write_json, write_text
from ..lora.budget import Budget
from ..lora.checkpoint import adapter_ranks, make_resizable, sync_config
from ..lora.peak import PeakMeter
from ..lora.plan import check_budget, problem_of, uniform_ranks
from ..lora.ranks import set_ranks
from ..lora.targets import TargetModule, find_target_modules
from .callback import RankPilotCallback
from .config import FinetuneConfig, as_json
from .policy_file import load_policy
from .probing import largest_batch, price_plans, undisturbed
from .resume import is_complete
from .run_folder import open_run
from .workload import Workload, adapt, load_model, load_workload, resolve_model

PILOT, UNIFORM = "rankpilot", "uniform"

MEASURE_EVERY = 10
"""Steps from one measured peak to the next: the report draws them. A measured step takes about 1.15 of a plain one."""


class RunMetrics(TrainerCallback):  # type: ignore[misc]
    """Writes a run's curves as JSON lines, and times its steps.

    Args:
        path: the file; a resumed run goes on in it.
        meter: measures peaks, for a run that has no RankPilotCallback to do it.
    """

    def __init__(self, path: Path, meter: PeakMeter | None = None) -> None:
        self.path, self.meter = path, meter
        self.step_s: list[float] = []
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Drop what an interrupted run wrote after its last checkpoint."""
        rows = [row for row in read_json_lines(self.path) if row["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows if state.global_step > 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """The clock starts."""
        if self.meter and self.meter.due(state.global_step):
            self.meter.begin(objects["model"], objects["optimizer"])
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """The passes are over."""
        if self.meter:
            self.meter.stepping()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """The clock stops."""
        self.step_s.append(time.perf_counter() - self._started)
        peak = self.meter.end(state.global_step, objects["model"]) if self.meter else None
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
        """Losses and accuracies; a run that has broken down ends here."""
        norm = (logs or {}).get("grad_norm", 0.0)
        if not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"The gradient norm is {norm} at step {state.global_step}: training diverged. Lower --learning-rate."
            )
        kept = {key: float(v) for key, v in (logs or {}).items() if key in ("loss", "eval_loss", "eval_accuracy")}
        if kept:
            append_json_line(self.path, {"step": state.global_step, **kept})


class LossInProgressBar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's bar with the latest losses in it, in place of a line for each log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        """Show them."""
        if self.training_bar is not None and logs:
            shown = {key: f"{float(logs[key]):.4f}" for key in ("loss", "eval_loss") if key in logs}
            self.training_bar.set_postfix(shown, refresh=False)


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
    with undisturbed():
        batch = largest_batch(workload.train, trainer.data_collator, config.batch_size, trainer.args.device)
        prices = price_plans(budget, targets, model, batch, None, signals=False)
    problem = problem_of(targets, prices.cost, prices.limit)
    check_budget(problem, [target.name for target in targets])
    ranks = uniform_ranks(problem).tolist()
    set_ranks(targets, dict(zip((t.name for t in targets), ranks, strict=True)), seed=config.seed)
    sync_config(model, targets)
    return prices.limit


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


_RELOAD = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
import transformers
spec = json.load(sys.stdin)
kind = getattr(transformers, spec["auto_class"])
base = kind.from_pretrained(spec["base"], **spec["options"])
model = PeftModel.from_pretrained(base, spec["adapter"]).eval()
with torch.no_grad():
    logits = model(**load_file(spec["inputs"])).logits
save_file({"logits": logits.contiguous()}, spec["logits"])
assert not any(name.split(".")[0] == "rankpilot" for name in sys.modules)
"""


def check_reload(config: FinetuneConfig, workload: Workload, model: PeftModel, adapter: Path) -> dict[str, Any]:
    """Load the adapter with plain PEFT in a fresh process that never imports rankpilot, and compare logits.

    Returns:
        `identical`, and `max_abs_difference` of the logits of 16 held-out rows.
    """
    scratch = adapter.parent / "reload"
    scratch.mkdir(exist_ok=True)
    rows = [workload.held_out[i] for i in range(min(16, len(workload.held_out)))]
    batch = {k: v.cpu() for k, v in workload.collator(rows).items() if k in ("input_ids", "attention_mask")}
    model = model.cpu().eval()
    with torch.no_grad():
        expected = model(**batch).logits
    save_file({k: v.contiguous() for k, v in batch.items()}, scratch / "inputs.safetensors")
    classifies = workload.task == "classification"
    spec = {
        "base": resolve_model(config.model),
        "options": {"num_labels": len(workload.labels)} if classifies else {},
        "auto_class": "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM",
        "adapter": str(adapter.resolve()),
        "inputs": str((scratch / "inputs.safetensors").resolve()),
        "logits": str((scratch / "logits.safetensors").resolve()),
    }
    command = [sys.executable, "-c", _RELOAD]
    done = subprocess.run(command, input=json.dumps(spec), text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RunFolderError(f"Plain PEFT could not load {adapter}: {done.stderr.strip().splitlines()[-1:]}")
    difference = float((load_file(scratch / "logits.safetensors")["logits"] - expected).abs().max())
    return {"identical": difference == 0.0, "max_abs_difference": difference}


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
        UnknownNameError, AssetError, DataError, PolicyFileError, BudgetError: bad input, before any training.
    """
    tell = on_phase or (lambda text: None)
    policy = load_policy(config.policy)
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
    open_run(folder, as_json(config), resume=resume)
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
