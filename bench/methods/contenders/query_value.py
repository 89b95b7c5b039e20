"""Query and value alone, as in the paper of LoRA (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

from functools import partial

from ....common.arrays import IntArray
from ..method import StaticMethod
from ..study import Modules
from .modules import QUERY_AND_VALUE, at_rank, ending


def _plan(rank: int, modules: Modules, budget: str) -> IntArray:
    return at_rank(modules, ending(modules, QUERY_AND_VALUE), rank)


QUERY_VALUE_16 = StaticMethod("qv-16", "rank 16 on query and value", partial(_plan, 16), quick=True)
QUERY_VALUE_64 = StaticMethod("qv-64", "rank 64 on query and value", partial(_plan, 64))
