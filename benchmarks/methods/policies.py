"""Rules and policies inside the benchmark: with all their decisions in a plain loop, or their first plan, kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from rankpilot.agents.chooser import PlanChooser
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import load_policy, policy_schedule
from rankpilot.common.arrays import IntArray
from rankpilot.common.files import sha256
from rankpilot.cost.recording import Batch
from rankpilot.errors import ConfigError
from rankpilot.finetune.allocate import static_plan
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.run import TrainingRun
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.plan.goal import GoalKind
from rankpilot.plan.worth import FILE
from torch.utils.data import DataLoader

from .plans import module_names
from .rows import Work, plan_ranks, plan_text
from .study import Group, Outcome, Study
from .tasks import Cell
from .texts import load_data
from .training import Driver, adapted_model, new_loader

RECORDED = "default of 0.2"
"""The policy that shipped with version 0.2, of which the stored rows are."""

_RECORD = {"policy": "default", "sha": "d75f87563bcd7b87"}
_RECORD_OF_GOALS = {"doubt": "0.2 0.3", "broad": "0.5 0.667 0.5"}


@lru_cache(maxsize=16)
def identity(spec: str, *, saves: bool = False) -> dict[str, Any]:
    """Arguments of work that tell a policy: a learned one by its weights, and the one that ships by its expectations.

    Args:
        spec: its name, or its folder.
        saves: whether it has a goal of cost.
    """
    if spec == RECORDED:
        return _RECORD | (_RECORD_OF_GOALS if saves else {})
    policy = load_policy(spec)
    if isinstance(policy, LearnedPolicy):
        return {"policy": spec, "sha": str(policy.sha256)[:16]}
    return {"policy": spec, "sha": sha256(FILE)[:16]} if isinstance(policy, PlanChooser) else {"policy": spec}


def policy_of(work: Work) -> str:
    """The policy of some work.

    Raises:
        ConfigError: it is that of version 0.2.
    """
    if work.get("sha") == _RECORD["sha"]:
        raise ConfigError(
            "These rows are of the policy of rankpilot 0.2, and some are missing: the git tag evidence-0.2 makes them."
        )
    return str(work.get("policy"))


MEASURE_EVERY = 50
"""Steps from one measured peak to the next."""


class PilotDriver(Driver):
    """The plain-loop API of rankpilot inside the loop of the benchmark; see `Driver`.

    Args:
        work: with the arguments policy, budget, seed, and perhaps `recompute`, whether layers may run again.
    """

    def __init__(self, work: Work) -> None:
        spec = policy_of(work)
        names = module_names(work.task)
        super().__init__(adapted_model(work.task, work.get("seed")), np.full(len(names), REFERENCE_RANK))
        self.pilot: RankPilot = RankPilot(
            load_policy(spec),
            work.get("budget"),
            schedule=policy_schedule(spec),
            seed=work.get("seed"),
            measure_every=MEASURE_EVERY,
            exact_savers=False,
            gradient_checkpointing="auto" if work.get("recompute") else False,
            prefix_cache="off",
            tell=lambda line: None,
        )

    def begin(self, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], steps: int) -> None:
        """Measure, probe, and apply the first plan."""
        self.pilot.begin(TrainingRun.of_loader(self.model, optimizer, loader, total_steps=steps))

    def before_step(self, batch: Batch) -> None:
        """Before the forward pass."""
        self.pilot.before_step(batch)

    def gradients(self, loss: torch.Tensor) -> None:
        """Gradients are there, and clipped."""
        self.pilot.before_optimizer_step(loss)

    def cleared(self, step: int) -> None:
        """Decide, where it is due."""
        self.pilot.after_step()

    def changes(self, step: int) -> bool:
        """Whether a decision is due."""
        assert self.pilot.controller is not None, "training has begun"
        return step < self.pilot.controller.total_steps and self.pilot.controller.due(step)

    def ranks(self) -> IntArray:
        """Current rank of each module."""
        assert self.pilot.controller is not None, "training has begun"
        return self.pilot.controller.ranks.copy()

    def buffer_bytes(self) -> int:
        """The averages of gradients from which signals come."""
        assert self.pilot.controller is not None, "training has begun"
        return int(self.pilot.controller.adapters.meter.buffer_bytes)

    def finish(self) -> dict[str, Any]:
        """Predicted and measured peaks, and steps above the budget."""
        pilot = self.pilot
        pilot.finish()
        peaks = [peak for _, peak in pilot.peaks]
        return {
            "predicted": max(cost for _, cost in pilot.predictions),
            "measured": max(peaks),
            "limit": pilot.limit,
            "breaches": sum(peak > pilot.limit for peak in peaks),
        }


@dataclass(frozen=True)
class Piloted:
    """A policy that decides before the first step and some times on the way.

    Attributes:
        name: see `Method`.
        policy: its name, or its folder.
        description: see `Method`.
        group: see `Method`.
        quick: see `Method`.
        recompute: whether layers may run again in the backward pass; None if not.
    """

    name: str
    policy: str
    description: str
    group: Group = "ours"
    quick: bool = False
    recompute: Literal[True] | None = None

    def run(self, study: Study, cell: Cell, rate: float, seed: int) -> Work:
        """The training under the policy."""
        given = {"budget": cell.budget, "recompute": self.recompute}
        return study.training(cell.task, "pilot", rate, seed, **given, **identity(self.policy))

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        return study.outcome(cell, lambda rate, seed: self.run(study, cell, rate, seed))


ROOM = "150%"
"""The budget of plans that save: the plan with which they are compared fits."""


def make_plan(work: Work) -> dict[str, Any]:
    """The plan of the argument `policy` under `budget`, at a rate and a seed, for a run of the task's length.

    With the argument `goal` it is the cheapest one that surely loses nothing.
    """
    task, seed = work.task, work.get("seed")
    model, spec = adapted_model(task, seed), policy_of(work)
    loader = new_loader(task, load_data(task), seed)
    plan = static_plan(
        model,
        loader,
        budget=work.get("budget"),
        policy=load_policy(spec),
        schedule=policy_schedule(spec),
        seed=seed,
        learning_rate=work.get("rate"),
        total_steps=task.steps,
        goal=work.get("goal") or "quality",
        exact_savers=False,
        gradient_checkpointing=False,
    )
    return {"plan": plan_text(list(plan.ranks.values())), "predicted": plan.cost, "limit": plan.limit}


@dataclass(frozen=True)
class FirstPlan:
    """Plain LoRA at the first plan of a policy.

    Attributes:
        name: see `Method`.
        policy: its name, or its folder.
        description: see `Method`.
        group: see `Method`.
        quick: see `Method`.
        goal: of the policy; one of cost plans with room for plain LoRA, whatever the budget of the cell.
    """

    name: str
    policy: str
    description: str
    group: Group = "adaptive"
    quick: bool = False
    goal: GoalKind = "quality"

    def planning(self, cell: Cell, rate: float, seed: int) -> Work:
        """What makes the plan for a rate and a seed."""
        goal = None if self.goal == "quality" else self.goal
        given = {"budget": ROOM if goal else cell.budget, "goal": goal, **identity(self.policy, saves=bool(goal))}
        return Work.of("plan", cell.task, rate=rate, seed=seed, **given)

    def run(self, study: Study, cell: Cell, rate: float, seed: int) -> Work:
        """The training at the plan for this rate and seed."""
        made = study.result(self.planning(cell, rate, seed))
        return study.plan_run(cell.task, plan_ranks(made["plan"]), rate, seed)

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        return study.outcome(
            cell, lambda rate, seed: self.run(study, cell, rate, seed), lambda *given: self.planning(cell, *given)
        )


METHODS = (
    FirstPlan("gradient-norm", "gradient-norm", "one-shot gradient norms, within the modules of top-down"),
    FirstPlan("random", "random", "random ranks that use the budget up", quick=True),
    FirstPlan("top-down", "top-down", "rule: as many top layers as fit at a useful rank", quick=True),
    Piloted("signal-mean", "signal-mean", "rule: ranks by the mean of three signals, decided anew", "adaptive"),
    Piloted("ours", RECORDED, "the shipped policy, all its decisions", quick=True),
    Piloted(
        "ours-recompute", RECORDED, "the shipped policy, as few layers run again as its plans need", recompute=True
    ),
    FirstPlan(
        "ours-saves-time",
        RECORDED,
        "the broad plan of least time that surely loses at most 1 %",
        "saving",
        goal="time",
    ),
    FirstPlan(
        "ours-saves-bytes",
        RECORDED,
        "the broad plan of fewest bytes that surely loses at most 1 %",
        "saving",
        goal="bytes",
    ),
)
"""Rules, and the policy of version 0.2."""
