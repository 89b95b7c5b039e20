"""The modules of a task's model, by name and place."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ....common.arrays import BoolArray, IntArray
from ....lora.targets import find_target_modules
from ..ranks import plan_text
from ..study import Modules, Study
from ..tasks import Cell, MethodTask
from ..work import Value, Work, adapted_model

QUERY_AND_VALUE = ("query", "value", "q_proj", "v_proj", "c_attn")
"""Ends of names; GPT-2 has one module for query, key and value."""

MLP = ("intermediate.dense", "gate_proj", "up_proj", "down_proj", "c_fc", "mlp.c_proj")


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
