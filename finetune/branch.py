"""A run gone on with, from its start or a checkpoint, with another plan: same seed, same batches, same budget.

Plans with which a run can be gone on with: those that its log knows, and those of a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..agents.learned.policy_file import policy_schedule
from ..agents.log import DecisionLog
from ..agents.plan_file import GivenPlan, read_plan, shuffled_plan
from ..agents.schedule import ONCE
from ..common.files import atomic_path, read_object, write_json
from ..common.run_folder import CONFIG, open_run
from ..common.settings import as_json, from_json
from ..errors import BudgetError, ConfigError, RunFolderError
from ..plan.plan import uniform_ranks
from .callback import RankPilotCallback, attach
from .checkpoint import STATE, fault_of, policy_settings
from .config import PILOT, FinetuneConfig
from .experiment import piloted_options, run_one
from .pilot import RankPilot
from .trainer import read_workload


class _TakesPlan(TrainerCallback):  # type: ignore[misc]
    """Takes a plan at one step of a run that goes on from there; one of a later step has it already."""

    def __init__(self, pilot: RankPilot, plan: GivenPlan, at: int) -> None:
        self._pilot, self._plan, self._at = pilot, plan, at

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Take the plan where the run goes on at its step; the pilot has heard of the event before.

        Raises:
            BudgetError: the plan does not fit the run's budget.
        """
        if state.global_step != self._at:
            return
        if self._at > 0:
            self._pilot.take(self._plan.ranks)
        assert self._pilot.controller is not None, "the run has begun"
        short = [
            target.name
            for target in self._pilot.controller.targets
            if target.rank != min(self._plan.ranks[target.name], target.max_rank)
        ]
        if short:
            raise BudgetError(
                f"The plan does not fit the run's budget of {self._pilot.budget}: {len(short)} modules would have "
                f"other ranks, such as {short[0]}. Branch with a plan that costs less, or from a run with a larger "
                "budget."
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

        def attached(trainer: Trainer) -> RankPilotCallback:
            # From the start one decision is enough; it may then spend what signal buffers would take.
            options = piloted_options(config, output, goal="quality", tolerance=None, explore=None)
            schedule = policy_schedule(config.policy) if at else ONCE
            bounds = options.bounds if at else None
            callback = attach(trainer, given, options, schedule=schedule, bounds=bounds)
            trainer.add_callback(_TakesPlan(callback.pilot, given, at))
            return callback

        result = run_one(config, workload, output, PILOT, pilot=attached)
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


NAMED = {
    "final": "the ranks with which the run ended",
    "first": "the ranks of its first plan",
    "shuffled": "the final ranks, dealt anew among the modules of each kind, or the adapted ones if bytes count",
    "uniform": "one rank on as many top layers as can have rank 8 in the budget, rounded down onto the ladder",
}
"""Plans by name."""


def other_plan(log: DecisionLog, which: str, seed: int = 0) -> Mapping[str, int]:
    """A plan by name, or from a file.

    Args:
        log: of the run.
        which: one of `NAMED`, or a file that `read_plan` reads.
        seed: of a shuffled plan.

    Raises:
        ConfigError: no such plan or file, or it holds no ranks.
        RunFolderError: the log cannot be read.
    """
    if which not in NAMED:
        if not Path(which).exists():
            known = ", ".join(f"{name} ({meaning})" for name, meaning in NAMED.items())
            raise ConfigError(f"{which} is no file and no plan by name. Plans by name: {known}.")
        return read_plan(Path(which))
    if which == "first":
        return log.logged(0).plan()
    last = log.read()[-1]
    if which == "shuffled":
        return shuffled_plan(last, seed)
    if which == "uniform":
        ladder, ranks = last.problem.ladder, uniform_ranks(last.problem.fresh())
        return dict(zip(last.observation.names, ladder.array[ladder.rung(ranks)].tolist(), strict=True))
    return last.plan()
