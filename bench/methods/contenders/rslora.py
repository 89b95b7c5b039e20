"""rsLoRA: as many top layers as fit at rank 32, with the scaling alpha / sqrt(rank)."""

from __future__ import annotations

from ....common.arrays import IntArray
from ..method import StaticMethod
from ..study import Modules
from .modules import deepest, window


def _plan(modules: Modules, budget: str) -> IntArray:
    return window(modules, max(deepest(modules, budget, 32), 1), 32)


RSLORA = StaticMethod("rslora-32", "rsLoRA, rank 32 on as many top layers as fit", _plan, trainer="rslora")
