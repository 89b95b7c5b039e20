"""A real fine-tune under a policy, and baselines of fixed ranks with the same seed and batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import Trainer, set_seed

from ..agents.policy_file import load_policy
from ..common import files
from ..common.devices import find_energy_counter
from ..common.errors import DataError, NonFiniteError, RunFolderError
from ..common.processes import Processes, is_first_process
from ..cost.budget import Budget
from ..cost.record.peak_meter import PeakMeter
from ..data.workload import Workload
from ..decide.log import DecisionLog
from ..lora.peft_config import adapter_ranks
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import find_target_modules
from .allocate import StaticPlan, static_plan
from .callback import RankPilotCallback, attach
from .checkpoint import last_checkpoint
from .dry_run import begin_only
from .options import ALL_LINEAR, PILOT, UNIFORM, FinetuneConfig, rank_bounds_of
from .step.replicas import check_arguments
from .trainer import RunMetrics, hardware_facts, new_arguments, new_model, new_trainer, read_workload
from .watches import all_finite

logger = logging.getLogger(__name__)

MEASURE_EVERY = 10
"""Steps between measured peaks, which the report plots; a measured step takes about 1.15 times as long."""


def finetune(
    config: FinetuneConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_phase: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a fine-tune under a policy, and its baselines if requested.

    Each process started by torchrun or accelerate calls this; the first one writes and reports.

    Args:
        config: the settings of the fine-tune.
        folder: the run's folder.
        resume: continue an interrupted run; finished parts are not repeated.
        on_phase: called with a short description of each phase.

    Raises:
        RunFolderError: see `open_run`.
        UnknownNameError, AssetError, DataError, PolicyFileError, BudgetError, UnsupportedError: bad input, before any
            training.
    """
    tell = on_phase if on_phase and is_first_process() else lambda text: None
    policy = load_policy(config.policy)
    config, workload = read_workload(config, tell)
    check_arguments(new_arguments(config, workload.task, folder))  # report unsuitable settings early
    rank_bounds_of(config.bounds)
    processes, settings = Processes.of_this_run(), files.as_json(FinetuneConfig, config)
    with ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(files.open_run(folder, settings, resume=resume)))
        runs = {}
        for name, under in _runs(config, policy.name).items():
            tell(f"fine-tuning {under}")
            runs[name] = run_one(config, workload, folder, name, tell)
        summary = {
            "model": config.model,
            "data": config.data,
            "policy": policy.name,
            "seed": config.seed,
            "steps": runs[PILOT]["steps"],
            **_head(workload),
            "runs": runs,
        }
        processes.on_first(lambda: files.write_json(folder / "summary.json", summary))
    return summary


def _runs(config: FinetuneConfig, policy: str) -> dict[str, str]:
    """Return the runs of a fine-tune by name, with a description of each."""
    runs = {PILOT: f"under {policy}"}
    if config.compare_uniform:
        runs[UNIFORM] = "with uniform ranks"
    if config.compare_all_linear:
        runs[ALL_LINEAR] = f"with rank {REFERENCE_RANK} on all modules, without a budget"
    return runs


def plan_ahead(
    config: FinetuneConfig,
    on_phase: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> StaticPlan:
    """Return the initial plan of `finetune`, without training; raises the same errors.

    Args:
        config: the settings of the fine-tune.
        on_phase: called with a short description of each phase.
        log: the folder of a decision log of the plan; None for no log.
    """
    tell = on_phase or (lambda text: None)
    config, workload = read_workload(config, tell)
    with TemporaryDirectory() as folder:
        trainer = new_trainer(config, workload, new_model(config, workload), Path(folder), [])
        tell(f"planning under {config.policy}")
        set_seed(config.seed)
        return static_plan(trainer, None, config.policy, config.pilot_options(log=log))


def dry_run(config: FinetuneConfig, on_phase: Callable[[str], None], tell: Callable[[str], None]) -> None:
    """Tell how `finetune` would begin, in at most ten lines, without training; raises the same errors.

    Args:
        config: the settings of the fine-tune.
        on_phase: called with a short description of each phase.
        tell: called with each line.
    """
    config, workload = read_workload(config, on_phase)
    with TemporaryDirectory() as folder, suppress(SystemExit):
        trainer = new_trainer(config, workload, new_model(config, workload), Path(folder), [])
        begin_only(attach(trainer, config.policy, config.pilot_options()), tell)
        set_seed(config.seed)
        trainer.train()


def _head(workload: Workload) -> dict[str, Any]:
    """Return the number of outputs of the head, and the baseline of an accuracy: the share of the largest class."""
    if not workload.labels:
        return {}
    counts, rows = np.bincount(np.asarray(workload.held_out["labels"])), len(workload.held_out)
    return {"outputs": len(workload.labels), "held_out_rows": rows, "largest_class": int(counts.max()) / rows}


def run_one(
    config: FinetuneConfig,
    workload: Workload,
    folder: Path,
    name: str,
    tell: Callable[[str], None] = logger.warning,
) -> dict[str, Any]:
    """Run one fine-tune to its end, from its last complete checkpoint if there is one.

    Args:
        config: the settings of the fine-tune.
        workload: the training and evaluation texts.
        folder: the folder of all runs.
        name: `PILOT`, `UNIFORM` for equal ranks, or `ALL_LINEAR` for plain LoRA.
        tell: called with a line for each unreadable checkpoint.

    Returns:
        The content of `result-NAME.json`. If that file already exists, nothing runs.

    Raises:
        RunFolderError: it ended before its last step, as after a just-in-time checkpoint.
    """
    processes, result_path = Processes.of_this_run(), folder / f"result-{name}.json"
    if known := processes.on_first(lambda: _read_result(result_path)):
        return known
    model = new_model(config, workload)
    piloted, metrics_path = name != ALL_LINEAR, folder / f"metrics-{name}.jsonl"
    device = new_arguments(config, workload.task, folder / name).device
    hardware, energy = hardware_facts(device), find_energy_counter(device)
    metrics = RunMetrics(metrics_path, None if piloted else PeakMeter(MEASURE_EVERY), energy)
    trainer = new_trainer(config, workload, model, folder / name, [metrics] if processes.first else [])
    decides = _decides(config, trainer, folder, name)
    checkpoint = last_checkpoint(folder / name, piloted=piloted, tell=tell)
    set_seed(config.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step, steps, patience = trainer.state.global_step, trainer.state.max_steps, config.early_stopping or math.inf
    waited = max(getattr(one, "early_stopping_patience_counter", 0) for one in trainer.callback_handler.callbacks)
    if step < steps and waited < patience:
        raise RunFolderError(f"Run {name} stopped at step {step} of {steps}. Continue it with --resume.")
    if not all_finite(p for p in model.parameters() if p.requires_grad):
        raise NonFiniteError(
            f"Run {name} ended with NaN or infinite weights, which were not saved. Its last checkpoint is "
            f"{last_checkpoint(folder / name, piloted=piloted, tell=tell)}. Lower the learning rate."
        )
    held_out = trainer.evaluate()

    def result() -> dict[str, Any]:
        return _result(trainer, metrics, held_out, decides) | {"hardware": hardware}

    return processes.on_first(lambda: _written(config, workload, model, result_path, result, held_out["eval_loss"]))


def _written(
    config: FinetuneConfig,
    workload: Workload,
    model: PeftModel,
    path: Path,
    result: Callable[[], dict[str, Any]],
    held_out: float,
) -> dict[str, Any]:
    """Save the adapter of a finished run, and write its result.

    Raises:
        NonFiniteError: the held-out loss is not finite; the adapter is saved.
    """
    folder = path.parent / path.stem.removeprefix("result-")
    _save_adapter(model, workload, folder)
    if not math.isfinite(held_out):
        raise NonFiniteError(
            f"The held-out loss is {held_out}: training diverged, or no held-out row has a label that counts. "
            f"The adapter is in {folder / 'adapter'}."
        )
    found = result()
    if config.merge:
        with files.atomic_path(folder / "merged") as temporary:
            model.merge_and_unload().save_pretrained(temporary)
            workload.tokenizer.save_pretrained(temporary)
    files.write_json(path, found)
    return found


def _read_result(path: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None if its file is damaged, to resume from its last checkpoint."""
    with suppress(FileNotFoundError, DataError):
        return files.read_object(path)
    return None


def _result(
    trainer: Trainer, metrics: RunMetrics, held_out: dict[str, float], decides: RankPilotCallback | None
) -> dict[str, Any]:
    """Return the recorded result of a finished run."""
    if decides:
        for step, peak in decides.peaks:
            files.append_json_line(metrics.path, {"step": step, "peak_bytes": peak})
    targets, energy = find_target_modules(trainer.model), metrics.energy
    logged: dict[str, Any] = next((row for row in reversed(trainer.state.log_history) if "parts" in row), {})
    return {
        **{name: logged[name] for name in ("parts", "padding_saved", "batches_too_large") if name in logged},
        "held_out_loss": held_out["eval_loss"],
        "held_out_accuracy": held_out.get("eval_accuracy"),
        "adapter_parameters": sum(target.rank * (target.d_in + target.d_out) for target in targets),
        # From the file: a run killed after its last step measures nothing when resumed.
        "peak_bytes": max(row["peak_bytes"] for row in files.read_json_lines(metrics.path) if "peak_bytes" in row),
        "budget_bytes": decides.limit if decides else None,
        "median_step_s": float(np.median(metrics.step_s)) if metrics.step_s else None,
        "train_s": metrics.train_s,
        "energy_joules": metrics.energy_joules,
        "energy_source": energy.source if energy else None,
        "steps": trainer.state.max_steps,
        "ranks": adapter_ranks(targets),
        "plain_learning_rate": _plain_rate(trainer, decides),
    }


def _plain_rate(trainer: Trainer, decides: RankPilotCallback | None) -> float:
    """Return the peak learning rate for plain LoRA."""
    rates = decides.pilot.rates if decides else None
    return float(rates[0] if rates else trainer.args.learning_rate)


def _decides(config: FinetuneConfig, trainer: Trainer, folder: Path, name: str) -> RankPilotCallback | None:
    """Attach the policy of a run, according to the settings; None for plain LoRA."""
    if name != PILOT and isinstance(config.learning_rate, str):  # the rate found by the run under the policy
        with suppress(FileNotFoundError, DataError, KeyError):
            trainer.args.learning_rate = files.read_object(folder / f"result-{PILOT}.json")["plain_learning_rate"]
    if name == ALL_LINEAR:
        return None
    if name == UNIFORM:
        own: dict[str, Any] = {"goal": "quality", "tolerance": None, "learning_rate": None, "control": None}
        own |= {"budget": _uniform_budget(config, folder), "seed": config.seed}
        return attach(trainer, UNIFORM, config.pilot_options(measure_every=MEASURE_EVERY, **own))
    return attach(trainer, config.policy, config.pilot_options(log=folder / "decisions", measure_every=MEASURE_EVERY))


def _save_adapter(model: PeftModel, workload: Workload, folder: Path) -> None:
    """Save the adapter, together with the tokenizer and the class names."""
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    workload.tokenizer.save_pretrained(adapter)
    if workload.labels:
        files.write_json(adapter / "labels.json", list(workload.labels))


def _uniform_budget(config: FinetuneConfig, folder: Path) -> Budget:
    """Return the budget of the run under the policy; for "auto", the bytes free before that run."""
    budget = config.budget_read
    if budget.kind != "auto":
        return budget
    return Budget("bytes", DecisionLog(folder / "decisions").logged(0).problem.limit)
