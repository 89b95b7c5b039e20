"""Plans by name: one rank everywhere, top layers, and the placement rules at several budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...allocation.placements import top_down, top_down_whole, top_layers
from ...allocation.problem import AllocationProblem, problem_of
from ...common.arrays import IntArray
from ...lora.targets import TargetModule
from ...memory.cost import Cost, total_cost
from ..learner import START_RANK

UNIFORM = (1, 4, 8, 16)
TOP_RANKS = (8, 16)
DEPTHS = {"top third": 1 / 3, "top half": 1 / 2, "top two thirds": 2 / 3}
BUDGETS = (0.30, 0.50, 0.65, 0.80, 1.00)
RULES: dict[str, Callable[[AllocationProblem], IntArray]] = {"rule16": top_down_whole, "fracrule": top_down}
PLAN_COUNT = len(UNIFORM) + len(TOP_RANKS) * len(DEPTHS) + len(RULES) * len(BUDGETS)
REFERENCE = f"all-linear, rank {START_RANK}"
REQUIRED = "fracrule at 65 %"


@dataclass(frozen=True, eq=False)
class NamedPlan:
    """A plan with what it is predicted to take.

    Attributes:
        name: for people.
        group: plans that are drawn with one mark: "all-linear", "top layers, rank 8", "rule16", ...
        ranks: int64 (modules,).
        predicted_bytes: at the peak of a step.
        budget: share of `REFERENCE`'s bytes that it was made for; None for none.
    """

    name: str
    group: str
    ranks: IntArray
    predicted_bytes: float
    budget: float | None = None


def named_plans(targets: Sequence[TargetModule], cost: Cost, layers: int) -> dict[str, NamedPlan]:
    """All plans of the comparison by name, `REFERENCE` among them.

    Args:
        targets: target modules of the model.
        cost: price of a plan.
        layers: transformer layers of the model; what stands above them, such as a pooler, goes with the top one.
    """
    everything = problem_of(targets, cost, float("inf"))
    reference = total_cost(cost, everything.uniform(START_RANK))
    plans = [*_simple(everything, layers), *_ruled(targets, cost, reference)]
    return {plan.name: plan for plan in plans}


def _simple(problem: AllocationProblem, layers: int) -> Iterator[NamedPlan]:
    """Plans that no budget decides."""
    above = int(problem.blocks.max()) + 1 - layers
    for rank in UNIFORM:
        ranks = problem.uniform(rank)
        yield NamedPlan(f"all-linear, rank {rank}", "all-linear", ranks, problem.price(ranks))
    for rank in TOP_RANKS:
        for depth, share in DEPTHS.items():
            ranks = top_layers(problem, round(share * layers) + above, rank)
            group = f"top layers, rank {rank}"
            yield NamedPlan(f"{depth}, rank {rank}", group, ranks, problem.price(ranks))


def _ruled(targets: Sequence[TargetModule], cost: Cost, reference: float) -> Iterator[NamedPlan]:
    for name, rule in RULES.items():
        for budget in BUDGETS:
            problem = problem_of(targets, cost, budget * reference)
            ranks = rule(problem)
            yield NamedPlan(f"{name} at {budget:.0%}".replace("%", " %"), name, ranks, problem.price(ranks), budget)
