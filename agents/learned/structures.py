"""Plans that follow from the structure of a model alone: kinds of modules, and parts of its depth, at one rank or two.

Which kinds a task needs, and how deep adapters must go, decides more on real models than ranks do. Kinds are told apart
by shapes (`ModuleShapes`): *wide* modules have the inner side of their layer, as an MLP has; the
others, those of attention, are *narrow*.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...allocation.observation import Observation, module_feature
from ...allocation.problem import AllocationProblem
from ...common.arrays import BoolArray, IntArray
from ...lora.ladder import REFERENCE_RANK

RANKS = (2, REFERENCE_RANK, 16)
"""Ranks of adapted modules; on real models, higher ones gained nothing."""

THIN = 2
"""The rank of the remaining modules in a mixture."""

KINDS = ("narrow", "wide")
DEPTHS = ("every other layer", "top quarter", "top half", "top three quarters")

ALL_LINEAR = "all-linear"
"""Name of plain LoRA as a candidate: rank 8 on every target module."""


def all_linear(problem: AllocationProblem) -> IntArray:
    """Plain LoRA, rank 8 on every target module or its highest, int64 (modules,); bounds and limit play no part."""
    return np.minimum(REFERENCE_RANK, problem.max_ranks)


def parts(observation: Observation) -> dict[str, BoolArray]:
    """The modules of each part of a model, bool (modules,), by name; parts that are empty or all of it are left out."""
    problem = observation.problem
    wide = module_feature(observation, "wide") > 0.5
    layers, turn = np.unique(problem.blocks, return_inverse=True)
    count = len(layers)
    found = {
        "all": np.ones(len(wide), dtype=np.bool_),
        "narrow": ~wide,
        "wide": wide,
        "every other layer": (count - 1 - turn) % 2 == 0,
        "top quarter": turn >= count - -(-count // 4),
        "top half": turn >= count - -(-count // 2),
        "top three quarters": turn >= count - -(-3 * count // 4),
    }
    for kind in KINDS:
        found[f"{kind} in the top half"] = found[kind] & found["top half"]
    return {name: part for name, part in found.items() if part.any() and (name == "all" or not part.all())}


def structure_plans(observation: Observation) -> Iterator[tuple[str, IntArray]]:
    """Plans by name: ranks on the ladder within the bounds, int64 (modules,); the limit plays no part.

    Args:
        observation: of a first decision.
    """
    problem = observation.problem
    found = parts(observation)
    for name, part in found.items():
        for rank in (1, *RANKS) if name == "all" else RANKS:
            yield f"{name} at {rank}", _plan(problem, part, rank, 0)
    for name in (*KINDS, "top half"):
        for rank in RANKS[1:]:
            if name in found:
                yield f"{name} at {rank}, others at {THIN}", _plan(problem, found[name], rank, THIN)


def _plan(problem: AllocationProblem, part: BoolArray, rank: int, others: int) -> IntArray:
    wanted = problem.ladder.rung(np.minimum(np.where(part, rank, others), problem.max_ranks))
    return problem.ladder.array[np.clip(wanted, problem.bottoms, problem.tops)]
