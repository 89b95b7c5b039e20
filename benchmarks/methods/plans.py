"""Plain LoRA at ranks that depend on the modules and the budget alone: fixed plans, windows, checkpointed ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from rankpilot.agents.observation import ModuleShapes
from rankpilot.common.arrays import BoolArray, IntArray
from rankpilot.lora.targets import find_target_modules

from .rows import Value, Work, plan_ranks, plan_text
from .study import DoesNotFitError, Group, Modules, Outcome, StaticMethod, Study, gather
from .tasks import Cell, MethodTask
from .training import Driver, adapted_model, by_name


@lru_cache(maxsize=8)
def module_names(task: MethodTask) -> list[str]:
    """The names of all linear modules of a task's model, in its order."""
    return [target.name for target in find_target_modules(adapted_model(task, 0))]


def ending(modules: Modules, ends: tuple[str, ...]) -> BoolArray:
    """Which modules have one of these names, (modules,)."""
    return np.array([name.endswith(ends) for name in modules.names])


def blocks(modules: Modules) -> IntArray:
    """The layer of each module, (modules,)."""
    return np.array([spec.block for spec in modules.specs])


def depth(modules: Modules) -> int:
    """How many layers there are."""
    return int(blocks(modules).max()) + 1


def at_rank(modules: Modules, chosen: BoolArray, rank: int) -> IntArray:
    """One rank on some modules, or the most that a module can have; 0 on the others."""
    most = np.array([spec.max_rank for spec in modules.specs])
    return np.where(chosen, np.minimum(rank, most), 0).astype(np.int64)


def window(modules: Modules, layers: int, rank: int) -> IntArray:
    """One rank on so many top layers."""
    return at_rank(modules, blocks(modules) >= depth(modules) - layers, rank)


def deepest(modules: Modules, budget: str, rank: int) -> int:
    """How many top layers fit at a rank; 0 if none does."""
    problem, layers = modules.problem(budget), depth(modules)
    return max((count for count in range(1, layers + 1) if problem.fits(window(modules, count, rank))), default=0)


def deepest_measured(study: Study, cell: Cell, most: int, trainer: str, rank: int, **arguments: Value) -> int:
    """How many top layers fit for a method whose bytes no model predicts: measured, from `most` layers down."""
    modules = study.modules(cell.task)
    limit = modules.problem(cell.budget).limit
    for layers in range(most, 0, -1):
        plan = plan_text(window(modules, layers, rank))
        work = Work.of("step", cell.task, trainer=trainer, plan=plan, seed=0, **arguments)
        if study.result(work)["measured"] <= limit:
            return layers
    return 0


def plain_lora(work: Work, **options: Any) -> Driver:
    """PEFT's LoRA at the ranks of the argument `plan`; `options` are further ones of LoraConfig."""
    ranks = plan_ranks(work.get("plan"))
    plan = by_name(ranks, module_names(work.task))
    return Driver(adapted_model(work.task, work.get("seed"), plan, **options), ranks)


def rslora(work: Work) -> Driver:
    """The same with a scaling of alpha / sqrt(rank) (Kalajdzievski, 2023, arXiv 2312.03732)."""
    return plain_lora(work, use_rslora=True)


Part = Callable[[Modules], BoolArray]
"""Chooses modules, bool (modules,)."""


def everything(modules: Modules) -> BoolArray:
    """All modules."""
    return blocks(modules) >= 0


def top(share: float) -> Part:
    """A share of the layers from the top down, rounded up."""
    return lambda modules: blocks(modules) >= depth(modules) - math.ceil(share * depth(modules))


def every_other_layer(modules: Modules) -> BoolArray:
    """The uppermost layer, and every second one below."""
    return np.asarray((depth(modules) - 1 - blocks(modules)) % 2 == 0)


def mlp(modules: Modules) -> BoolArray:
    """The modules of MLPs: they have the wide inner side of their layer, attention's do not."""
    return ModuleShapes.of(modules.specs).wide


def attention(modules: Modules) -> BoolArray:
    """All others."""
    return ~mlp(modules)


def query_and_value(modules: Modules) -> BoolArray:
    """Query and value, as in the paper of LoRA (Hu et al., 2021); GPT-2 has one module for query, key and value."""
    return ending(modules, ("query", "value", "q_proj", "v_proj", "c_attn"))


def both(first: Part, second: Part) -> Part:
    """What is in both parts."""
    return lambda modules: first(modules) & second(modules)


def _at(rank: int, part: Part) -> Callable[[Modules, str], IntArray]:
    return lambda modules, budget: at_rank(modules, part(modules), rank)


def _as_deep_as_fits(modules: Modules, budget: str) -> IntArray:
    return window(modules, max(deepest(modules, budget, 32), 1), 32)


def _saving(name: str, rank: int, part: Part) -> StaticMethod:
    described = f"rank {rank} on {name.replace('-', ' ')}"
    return StaticMethod(f"{name}-{rank}", described, _at(rank, part), "saving")


ALL_LINEAR = StaticMethod("all-linear-8", "rank 8 on all linear modules", _at(8, everything), quick=True)
TOP_HALF = StaticMethod("top-half-16", "rank 16 on the top half of the layers", _at(16, top(0.5)), quick=True)

PLANS = (
    ALL_LINEAR,
    StaticMethod("qv-16", "rank 16 on query and value", _at(16, query_and_value), quick=True),
    StaticMethod("qv-64", "rank 64 on query and value", _at(64, query_and_value)),
    TOP_HALF,
    StaticMethod("rslora-32", "rsLoRA, rank 32 on as many top layers as fit", _as_deep_as_fits, trainer="rslora"),
    _saving("attention", 8, attention),
    _saving("mlp", 8, mlp),
    _saving("top-three-quarters", 8, top(0.75)),
    _saving("top-half", 8, top(0.5)),
    _saving("top-quarter", 8, top(0.25)),
    _saving("every-other-layer", 8, every_other_layer),
    _saving("attention-top-half", 8, both(attention, top(0.5))),
    _saving("mlp-top-half", 8, both(mlp, top(0.5))),
    _saving("attention", 2, attention),
    _saving("mlp", 2, mlp),
    _saving("top-half", 2, top(0.5)),
    _saving("everything", 2, everything),
)
"""The fixed plans; those of the group "saving" are run in the suite of that name alone."""


TRIED_RANKS = (8, 16, 32)


def candidates(modules: Modules, budget: str) -> list[IntArray]:
    """At each rank as many top layers as fit, and half as many."""
    plans = {}
    for rank in TRIED_RANKS:
        most = deepest(modules, budget, rank)
        for layers in {most, (most + 1) // 2} - {0}:
            plan = window(modules, layers, rank)
            plans[plan_text(plan)] = plan
    return list(plans.values())


def best_plan(study: Study, cell: Cell, plans: list[IntArray]) -> tuple[IntArray, Outcome]:
    """The plan with the lowest loss on tuning seeds, each at its own rate, and what it did.

    Raises:
        DoesNotFitError: there are no plans.
    """
    if not plans:
        raise DoesNotFitError
    tried = gather(
        lambda plan: study.tuned(cell.task, lambda rate, seed: study.plan_run(cell.task, plan, rate, seed)), plans
    )
    best = min(range(len(plans)), key=lambda index: tried[index][1])
    works = frozenset(work for _, _, each in tried for work in each)
    plan, rate = plans[best], tried[best][0]
    return plan, study.runs(cell, lambda r, seed: study.plan_run(cell.task, plan, r, seed), rate, works)


@dataclass(frozen=True)
class Simple:
    """The best of windows of top layers at rank 8, 16 and 32, each at its own rate."""

    name: str = "simple"
    group: Group = "static"
    description: str = "the best of windows of top layers at rank 8, 16, 32, chosen on tuning seeds"
    quick: bool = True

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        return best_plan(study, cell, candidates(study.modules(cell.task), cell.budget))[1]


def _step(cell: Cell, plan: IntArray) -> Work:
    """The timed step of a plan with as few layers checkpointed as the budget of a cell needs."""
    return Work.of("recompute", cell.task, plan=plan_text(plan), budget=cell.budget)


def _with_step(study: Study, cell: Cell, plan: IntArray, outcome: Outcome) -> Outcome:
    """What a plan did, at the bytes and the time of its step with layers checkpointed."""
    step = _step(cell, plan)
    return replace(outcome, bytes=(study.result(step)["predicted"],) * len(outcome.rows), step=step)


@dataclass(frozen=True)
class Checkpointed:
    """A static plan that fits because layers run again; losses are those of the plan without that, bit for bit.

    Attributes:
        name: see `Method`.
        description: see `Method`.
        plain: the plan without checkpointing.
        group: see `Method`.
        quick: see `Method`.
    """

    name: str
    description: str
    plain: StaticMethod
    group: Group = "static"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        ranks = self.plain.plan(study.modules(cell.task), cell.budget)
        study.result(_step(cell, ranks))  # fits, or there is nothing to train
        outcome = study.outcome(cell, lambda rate, seed: study.plan_run(cell.task, ranks, rate, seed))
        return _with_step(study, cell, ranks, outcome)


@dataclass(frozen=True)
class SimpleCheckpointed:
    """The best of all layers and the top half at rank 8, 16 and 32, chosen on tuning seeds, checkpointed to fit."""

    name: str = "simple-ckpt"
    description: str = "the best of all layers and the top half at rank 8, 16, 32, as few layers checkpointed as fit"
    group: Group = "static"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        layers = depth(modules)
        plans = [window(modules, count, rank) for rank in TRIED_RANKS for count in (layers, (layers + 1) // 2)]

        def fits(plan: IntArray) -> bool:
            try:
                study.result(_step(cell, plan))
            except DoesNotFitError:
                return False
            return True

        fitting = [plan for plan, fit in zip(plans, gather(fits, plans), strict=True) if fit]
        return _with_step(study, cell, *best_plan(study, cell, fitting))


WINDOWS = (
    Simple(),
    Checkpointed(
        "all-linear-8-ckpt", "rank 8 on all linear modules, as few layers checkpointed as fit", ALL_LINEAR, quick=True
    ),
    Checkpointed("top-half-16-ckpt", "rank 16 on the top half, as few layers checkpointed as fit", TOP_HALF),
    SimpleCheckpointed(),
)
"""Plans that are chosen, and plans that fit since layers run again."""
