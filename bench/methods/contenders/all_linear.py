"""Rank 8 on all linear modules: what most people run."""

from __future__ import annotations

from ....common.arrays import IntArray
from ..method import StaticMethod
from ..study import Modules
from .modules import depth, window


def _plan(modules: Modules, budget: str) -> IntArray:
    return window(modules, depth(modules), 8)


ALL_LINEAR = StaticMethod("all-linear-8", "rank 8 on all linear modules", _plan, quick=True)
