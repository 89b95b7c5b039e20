"""A real fine-tune under a policy, beside runs of other ranks with the same seed and batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import set_seed

from ..agents.learned.policy_file import load_policy
from ..common.energy import find_energy_counter
from ..common.files import append_json_line, atomic_path, read_json_lines, read_object, write_json
from ..common.run_folder import open_run
from ..common.settings import as_json
from ..common.termination import Terminated, on_sigterm
from ..data.workload import Workload
from ..errors import DataError
from ..lora.ladder import REFERENCE_RANK
from ..lora.peft_config import adapter_ranks
from ..lora.targets import find_target_modules
from ..memory.budget import Budget, TimeBudget
from ..memory.peak_meter import PeakMeter
from .allocate import StaticPlan, static_plan
from .callback import RankPilotCallback
from .checkpoint import last_checkpoint
from .config import ALL_LINEAR, PILOT, UNIFORM, FinetuneConfig
from .metrics import RunMetrics, hardware_facts
from .parallel_kinds import check_arguments
from .stop import StopWithCheckpoint
from .trainer import new_model, new_trainer, read_workload
from .trainer_settings import new_arguments, rank_bounds_of
from .uniform import UniformRanks

logger = logging.getLogger(__name__)

MEASURE_EVERY = 10
"""Steps from one measured peak to the next. The report draws them; a measured step takes about 1.15 times as long."""


def finetune(
    config: FinetuneConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_phase: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a fine-tune under a policy and, if asked for, those that it is compared with.

    Args:
        config: what to run.
        folder: the run's folder.
        resume: continue an interrupted run; finished parts are not repeated.
        on_phase: called with a few words on what happens next.

    Raises:
        RunFolderError: see `open_run`.
        UnknownNameError, AssetError, DataError, PolicyFileError, BudgetError, UnsupportedError: bad input, before any
            training.
    """
    tell = on_phase or (lambda text: None)
    policy = load_policy(config.policy)
    workload = read_workload(config, tell)
    check_arguments(new_arguments(config, workload.task, folder))  # so that a setting that does not fit is told now
    rank_bounds_of(config.bounds)
    with open_run(folder, as_json(FinetuneConfig, config), resume=resume):
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
        write_json(folder / "summary.json", summary)
    return summary


def _runs(config: FinetuneConfig, policy: str) -> dict[str, str]:
    """The runs of a fine-tune by name, and what each is under."""
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
    *,
    frontier: bool = False,
) -> StaticPlan:
    """The plan that `finetune` would begin with, without training; it raises the same errors.

    Args:
        config: the settings of the fine-tune.
        on_phase: called with what is done next.
        log: the folder of a decision log of the plan; None for no log.
        frontier: also weigh plans of any cost; see `StaticPlan.frontier`.
    """
    tell = on_phase or (lambda text: None)
    workload = read_workload(config, tell)
    with TemporaryDirectory() as folder:
        trainer = new_trainer(config, workload, new_model(config, workload), Path(folder), [])
        tell(f"planning under {config.policy}")
        bounds = rank_bounds_of(config.bounds)
        set_seed(config.seed)
        options: dict[str, Any] = {"bounds": bounds, "time": config.time, "explore": config.explore, "log": log}
        options |= {"goal": config.goal, "tolerance": config.tolerance, "frontier": frontier}
        options |= {"recompute": config.recompute, "scaling": config.kept}
        return static_plan(trainer, budget=config.budget, policy=config.policy, **options)


def _head(workload: Workload) -> dict[str, Any]:
    """How many outputs the head has, and with what an accuracy is to be compared: the share of the largest class."""
    if not workload.labels:
        return {}
    facts: dict[str, Any] = {"outputs": len(workload.labels), "held_out_rows": len(workload.held_out)}
    if workload.task == "classification":
        counts = np.bincount(np.asarray(workload.held_out["labels"]))
        facts["largest_class"] = int(counts.max()) / len(workload.held_out)
    return facts


def run_one(
    config: FinetuneConfig,
    workload: Workload,
    folder: Path,
    name: str,
    tell: Callable[[str], None] = logger.warning,
    ranks: RankPilotCallback | None = None,
) -> dict[str, Any]:
    """Run one fine-tune to its end, from its last complete checkpoint if there is one.

    Args:
        config: the settings of the fine-tune.
        workload: the texts to train and to evaluate on.
        folder: of all runs.
        name: `PILOT`, `UNIFORM` for equal ranks, or `ALL_LINEAR` for plain LoRA.
        tell: called with a line for each checkpoint that cannot be read.
        ranks: decides the ranks; by default what the settings say.

    Returns:
        What `result-NAME.json` holds. If that file is there already, nothing runs.

    Raises:
        Terminated: the process was asked to end; a checkpoint is saved if steps were done.
    """
    result_path = folder / f"result-{name}.json"
    with suppress(FileNotFoundError, DataError):  # the run of a torn result goes on from its last checkpoint
        return read_object(result_path)
    model = new_model(config, workload)
    pilot, metrics_path = name == PILOT, folder / f"metrics-{name}.jsonl"
    decides = ranks or _ranks(config, folder, name)
    device = new_arguments(config, workload.task, folder / name).device
    hardware, energy = hardware_facts(device), find_energy_counter(device)
    metrics = RunMetrics(metrics_path, None if pilot else PeakMeter(MEASURE_EVERY), energy)
    stop = StopWithCheckpoint()
    callbacks = [*([decides] if decides else []), metrics, stop]
    trainer = new_trainer(config, workload, model, folder / name, callbacks)
    checkpoint = last_checkpoint(folder / name, piloted=pilot, tell=tell)
    set_seed(config.seed)
    with on_sigterm(stop.stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        raise Terminated
    held_out = trainer.evaluate()
    if isinstance(decides, RankPilotCallback):
        for step, peak in decides.peaks:
            append_json_line(metrics_path, {"step": step, "peak_bytes": peak})
    targets = find_target_modules(model)
    _save_adapter(model, workload, folder / name)
    result = {
        "held_out_loss": held_out["eval_loss"],
        "held_out_accuracy": held_out.get("eval_accuracy"),
        "adapter_parameters": sum(target.rank * (target.d_in + target.d_out) for target in targets),
        # From the file: a run that was killed after its last step measures nothing when it goes on.
        "peak_bytes": max(row["peak_bytes"] for row in read_json_lines(metrics_path) if "peak_bytes" in row),
        "budget_bytes": decides.limit if decides else None,
        "median_step_s": float(np.median(metrics.step_s)) if metrics.step_s else None,
        "train_s": metrics.train_s,
        "energy_joules": metrics.energy_joules,
        "energy_source": energy.source if energy else None,
        "hardware": hardware,
        "steps": trainer.state.max_steps,
        "ranks": adapter_ranks(targets),
    }
    if config.merge:
        with atomic_path(folder / name / "merged") as temporary:
            model.merge_and_unload().save_pretrained(temporary)
            workload.tokenizer.save_pretrained(temporary)
    write_json(result_path, result)
    return result


def _ranks(config: FinetuneConfig, folder: Path, name: str) -> RankPilotCallback | UniformRanks | None:
    """The callback that decides the ranks of a run; None for plain LoRA."""
    if name == ALL_LINEAR:
        return None
    if name == UNIFORM:
        time = None if config.time is None else TimeBudget.parse(config.time)
        return UniformRanks(_uniform_budget(config, folder), config.seed, recompute=config.recompute, time=time)
    return RankPilotCallback(
        config.policy,
        config.budget,
        log=folder / "decisions",
        measure_every=MEASURE_EVERY,
        bounds=rank_bounds_of(config.bounds),
        recompute=config.recompute,
        time=config.time,
        explore=config.explore,
        scaling=config.kept,
        goal=config.goal,
        tolerance=config.tolerance,
    )


def _save_adapter(model: PeftModel, workload: Workload, folder: Path) -> None:
    """Save the adapter, with the tokenizer and the names of the classes beside it."""
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    workload.tokenizer.save_pretrained(adapter)
    if workload.labels:
        write_json(adapter / "labels.json", list(workload.labels))


def _uniform_budget(config: FinetuneConfig, folder: Path) -> Budget:
    """The budget of the run under the policy; for "auto", the bytes that were free before that run."""
    budget = Budget.parse(config.budget)
    if budget.kind != "auto":
        return budget
    return Budget("bytes", read_object(folder / f"result-{PILOT}.json")["budget_bytes"])
