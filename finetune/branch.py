"""A run gone on with, from its start or a checkpoint, with another plan: same seed, same batches, same budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..agents.learned.policy_file import policy_schedule
from ..agents.rules.given_plan import GivenPlan
from ..allocation.schedule import DecisionSchedule
from ..common.files import atomic_path, read_object, write_json
from ..common.run_folder import CONFIG, open_run
from ..common.settings import as_json, from_json
from ..errors import BudgetError, RunFolderError
from .callback import RankPilotCallback
from .checkpoint import STATE, fault_of
from .config import PILOT, FinetuneConfig
from .experiment import MEASURE_EVERY, run_one
from .run_settings import policy_settings
from .trainer import read_workload
from .trainer_settings import rank_bounds_of


class _Branch(RankPilotCallback):
    """Takes a plan at one step, and leaves it alone from then on."""

    def __init__(self, plan: GivenPlan, at: int, config: FinetuneConfig, log: Path) -> None:
        # From the start one decision is enough; it may then spend what signal buffers would take.
        schedule = policy_schedule(config.policy) if at else DecisionSchedule(fractions=(0.0,))
        super().__init__(
            plan,
            config.budget,
            log=log,
            schedule=schedule,
            measure_every=MEASURE_EVERY,
            bounds=rank_bounds_of(config.bounds) if at else None,
            recompute=config.recompute,
            time=config.time,
            scaling=config.kept,
        )
        self._plan, self._at = plan, at

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Go on from the checkpoint, and take the plan there; one of a step after it has the plan already."""
        super().on_train_begin(args, state, control, **objects)
        if state.global_step == self._at > 0:
            self.pilot.take(self._plan.ranks)
        controller = self.pilot.controller
        assert controller is not None, "the run has begun"
        wanted = [min(self._plan.ranks[target.name], target.max_rank) for target in controller.targets]
        short = [t.name for t, rank in zip(controller.targets, wanted, strict=True) if t.rank != rank]
        if state.global_step == self._at and short:
            raise BudgetError(
                f"The plan does not fit the run's budget of {self.pilot.budget}: {len(short)} modules would have other "
                f"ranks, such as {short[0]}. Branch with a plan that costs less, or from a run with a larger budget."
            )


def branch(
    source: Path,
    output: Path,
    plan: Mapping[str, int],
    *,
    at: int = 0,
    label: str = "branch",
    resume: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a fine-tune once more with a given plan from one step on.

    Everything else is that of the run: data, seed, batches, budget, learning rates. What the policy would have decided
    afterwards is not asked for; the plan stays.

    Args:
        source: the folder of a `rankpilot finetune` run.
        output: a new folder, of the same kind.
        plan: the rank of each target module, by its full name.
        at: the optimiser step from which the plan is in place: 0, or that of a checkpoint which `source` still has.
        label: what logs and pages call the plan.
        resume: go on with an interrupted branch.
        tell: called with what is done next.

    Returns:
        What `summary.json` of the output folder holds.

    Raises:
        RunFolderError: the source is no such run, has no such checkpoint, or the output folder holds something else.
        BudgetError: the plan does not fit the budget.
        UnknownNameError, ConfigError: the plan does not fit the modules.
    """
    config = _config(source)
    checkpoint = _checkpoint(source, at)
    given = GivenPlan(label, dict(plan))
    settings = {**as_json(FinetuneConfig, config), "branch": {"at": at, "label": label, "plan": dict(plan)}}
    workload = read_workload(config, tell or (lambda text: None))
    with open_run(output, settings, resume=resume):
        if checkpoint is not None and not (output / PILOT).exists():
            _copy(source, output, checkpoint, given)
        callback = _Branch(given, at, config, output / "decisions")
        result = run_one(config, workload, output, PILOT, ranks=callback)
        summary = {
            "model": config.model,
            "data": config.data,
            "policy": label,
            "seed": config.seed,
            "steps": result["steps"],
            "branch": {"of": str(source), "at": at},
            "runs": {PILOT: result},
        }
        write_json(output / "summary.json", summary)
    return summary


def _config(source: Path) -> FinetuneConfig:
    try:
        values = read_object(source / CONFIG)
        values.pop("branch", None)
        return from_json(FinetuneConfig, values)
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{source} holds no run of `rankpilot finetune` that this version can go on with: {error}"
        ) from error


def _checkpoint(source: Path, at: int) -> Path | None:
    """The checkpoint of a step; None for step 0."""
    if at == 0:
        return None
    path = source / PILOT / f"checkpoint-{at}"
    fault = fault_of(path, piloted=True)
    if fault:
        numbers = [found.name.rpartition("-")[2] for found in path.parent.glob("checkpoint-*")]
        there = sorted(int(number) for number in numbers if number.isdecimal())
        raise RunFolderError(
            f"{source} cannot be branched at step {at}: {fault}. It has checkpoints of the steps "
            f"{', '.join(map(str, there)) or 'none'}; step 0 is possible always. A run keeps more of them with "
            "--trainer save_total_limit=100."
        )
    return path


def _copy(source: Path, output: Path, checkpoint: Path, plan: GivenPlan) -> None:
    """Begin a branch with what its run was at a checkpoint, under the policy that keeps the plan."""
    for path in [source / "decisions", *source.glob(f"metrics-{PILOT}.jsonl")]:
        if path.is_dir():
            shutil.copytree(path, output / path.name, dirs_exist_ok=True)  # a copy may have been interrupted
        else:
            shutil.copy(path, output / path.name)
    with atomic_path(output / PILOT) as temporary:
        copied = temporary / checkpoint.name
        shutil.copytree(checkpoint, copied)
        state = read_object(copied / STATE)
        state["settings"] |= policy_settings(plan)
        write_json(copied / STATE, state)
