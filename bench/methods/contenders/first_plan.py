"""The first plan of a policy or a rule, made before training and kept: a probe, then plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....allocation.goal import GoalKind
from ....finetune.allocate import static_plan
from ..loop import new_loader
from ..method import Group
from ..ranks import plan_ranks, plan_text
from ..study import Outcome, Study
from ..tasks import Cell
from ..texts import load_data
from ..work import Work, adapted_model
from .policies import identity, load, schedule

ROOM = "150%"
"""The budget of plans that save: the plan with which they are compared fits."""


def make_plan(work: Work) -> dict[str, Any]:
    """The plan of the argument `policy` under `budget`, at a rate and a seed, for a run of the task's length.

    With the argument `goal` it is the cheapest one that surely loses nothing.
    """
    task, seed = work.task, work.get("seed")
    model, spec = adapted_model(task, seed), work.get("policy")
    loader = new_loader(task, load_data(task), seed)
    plan = static_plan(
        model,
        loader,
        budget=work.get("budget"),
        policy=load(spec),
        schedule=schedule(spec),
        seed=seed,
        learning_rate=work.get("rate"),
        total_steps=task.steps,
        goal=work.get("goal") or "quality",
    )
    return {"plan": plan_text(list(plan.ranks.values())), "predicted": plan.cost, "limit": plan.limit}


@dataclass(frozen=True)
class FirstPlan:
    """Plain LoRA at the first plan of a policy.

    Attributes:
        name: see `Method`.
        policy: see `policies.load`.
        description: see `Method`.
        group: see `Method`.
        quick: see `Method`.
        budget_factor: by what the budget of the cell is multiplied.
        goal: of the policy; one of cost plans with room for plain LoRA, whatever the budget of the cell.
    """

    name: str
    policy: str
    description: str
    group: Group = "adaptive"
    quick: bool = False
    budget_factor: float = 1.0
    goal: GoalKind = "quality"

    def planning(self, cell: Cell, rate: float, seed: int) -> Work:
        """What makes the plan for a rate and a seed."""
        budget = f"{float(cell.budget.rstrip('%')) * self.budget_factor:g}%"
        goal = None if self.goal == "quality" else self.goal
        given = {"budget": ROOM if goal else budget, "goal": goal, **identity(self.policy, saves=bool(goal))}
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
