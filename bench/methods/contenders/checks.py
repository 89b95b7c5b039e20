"""Methods that are worse or better by construction: if the benchmark does not find that, it measures nothing."""

from __future__ import annotations

from ....common.arrays import IntArray
from ..method import StaticMethod
from ..study import Modules
from .first_plan import FirstPlan
from .modules import at_rank, blocks


def _lowest(modules: Modules, budget: str) -> IntArray:
    return at_rank(modules, blocks(modules) == 0, 1)


LOWEST = StaticMethod("check-worse", "rank 1 in the lowest layer alone: worse by construction", _lowest, "check", True)
DOUBLE = FirstPlan("check-better", "top-down", "top-down with twice the budget: better", "check", True, 2.0)
