"""All methods: one file in `contenders`, one line here, one row in the test matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UnknownNameError
from .contenders import (
    adalora,
    all_linear,
    checkpointing,
    checks,
    eva,
    gora,
    lora,
    miss,
    ours,
    parts,
    query_value,
    rslora,
    rules,
    simple,
    top_half,
    tpe,
    without_rank_0,
)
from .contenders.best_of import BestOf
from .contenders.first_plan import FirstPlan, make_plan
from .contenders.pilot import PilotDriver, Piloted
from .method import Method
from .step import time_recomputed, time_step
from .work import Trainer, Work

_STATIC: tuple[Method, ...] = (
    all_linear.ALL_LINEAR,
    query_value.QUERY_VALUE_16,
    query_value.QUERY_VALUE_64,
    top_half.TOP_HALF,
    simple.SIMPLE,
)

_METHODS: tuple[Method, ...] = (
    *_STATIC,
    checkpointing.ALL_LINEAR,
    checkpointing.TOP_HALF,
    checkpointing.SIMPLE,
    rslora.RSLORA,
    adalora.EQUAL_PEAK,
    adalora.EQUAL_FINAL,
    eva.EVA,
    gora.GORA,
    rules.GRADIENT_NORM,
    rules.RANDOM,
    rules.TOP_DOWN,
    rules.TOP_DOWN_MLP,
    rules.SIGNAL_MEAN,
    tpe.TPE,
    BestOf("best-static", _STATIC),
    miss.MISS,
    ours.OURS,
    ours.RECOMPUTED,
    ours.FIRST,
    ours.REPLAY,
    ours.SHUFFLED,
    without_rank_0.WITHOUT_RANK_0,
    *ours.BLIND,
    checks.LOWEST,
    checks.DOUBLE,
    *parts.PARTS,
    ours.SAVES_TIME,
    ours.SAVES_BYTES,
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}

TRAINERS: dict[str, Trainer] = {
    "lora": lora.plain_lora,
    "rslora": lora.rslora,
    "pilot": PilotDriver,
    "adalora": adalora.AdaLoraDriver,
    "eva": eva.EvaDriver,
    "gora": gora.GoraDriver,
    "miss": miss.miss,
}
"""How a run is trained, by the name in its work."""

OWN_WORK: dict[str, Callable[[Work], dict[str, Any]]] = {
    "plan": make_plan,
    "search": tpe.search,
    "step": time_step,
    "recompute": time_recomputed,
}
"""Work that belongs to a method, by kind."""


def find_method(name: str) -> Method:
    """The method of that name; UnknownNameError if there is none."""
    if name not in METHODS:
        raise UnknownNameError.of("method", name, METHODS)
    return METHODS[name]


def methods_of(policies: tuple[str, ...]) -> list[Method]:
    """A policy with all its decisions, and its first plan, for each further policy that is to be compared."""
    return [
        method
        for policy in policies
        for method in (
            Piloted(policy, policy, f"the policy {policy}, all its decisions", quick=True),
            FirstPlan(f"{policy}, first plan", policy, f"the first plan of {policy}, kept", "ours", quick=True),
        )
    ]
