"""Fixed plans by kind of module and by depth, with which plans that save are compared.

Kinds are told by shapes (`ModuleShapes`): an MLP's modules have the wide inner side of their layer, attention's do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from ....allocation.module_shapes import ModuleShapes
from ....common.arrays import BoolArray, IntArray
from ..method import StaticMethod
from ..study import Modules
from .modules import at_rank, blocks, depth

Part = Callable[[Modules], BoolArray]
"""Chooses modules, bool (modules,)."""


def _everything(modules: Modules) -> BoolArray:
    return blocks(modules) >= 0


def _top(share: float, modules: Modules) -> BoolArray:
    """A share of the layers from the top down, rounded up."""
    return blocks(modules) >= depth(modules) - math.ceil(share * depth(modules))


def _every_other(modules: Modules) -> BoolArray:
    """The uppermost layer, and every second one below."""
    return np.asarray((depth(modules) - 1 - blocks(modules)) % 2 == 0)


def _mlp(modules: Modules) -> BoolArray:
    return ModuleShapes.of(modules.specs).wide


def _attention(modules: Modules) -> BoolArray:
    return ~_mlp(modules)


def _both(first: Part, second: Part, modules: Modules) -> BoolArray:
    return first(modules) & second(modules)


_HALF = partial(_top, 0.5)

_PARTS: dict[str, Part] = {
    "attention": _attention,
    "mlp": _mlp,
    "top-three-quarters": partial(_top, 0.75),
    "top-half": _HALF,
    "top-quarter": partial(_top, 0.25),
    "every-other-layer": _every_other,
    "attention-top-half": partial(_both, _attention, _HALF),
    "mlp-top-half": partial(_both, _mlp, _HALF),
}


def _plan(part: Part, rank: int, modules: Modules, budget: str) -> IntArray:
    return at_rank(modules, part(modules), rank)


def _method(name: str, part: Part, rank: int) -> StaticMethod:
    described = f"rank {rank} on {name.replace('-', ' ')}"
    return StaticMethod(f"{name}-{rank}", described, partial(_plan, part, rank), "saving")


PARTS = (
    *(_method(name, part, 8) for name, part in _PARTS.items()),
    *(_method(name, _PARTS[name], 2) for name in ("attention", "mlp", "top-half")),
    _method("everything", _everything, 2),
)
"""The twelve plans."""
