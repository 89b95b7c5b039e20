"""Rank 16 on all linear modules of the top half of the layers."""

from __future__ import annotations

from ....common.arrays import IntArray
from ..method import StaticMethod
from ..study import Modules
from .modules import depth, window


def _plan(modules: Modules, budget: str) -> IntArray:
    return window(modules, (depth(modules) + 1) // 2, 16)


TOP_HALF = StaticMethod("top-half-16", "rank 16 on the top half of the layers", _plan, quick=True)
