"""A tiny suite, and rows that are made up or run on a proxy base."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from rankpilot.cost.cost import cost_from_state
from rankpilot.lora.spec import ModuleSpec

from benchmarks.methods.rows import RowStore, Work, plan_ranks
from benchmarks.methods.study import Modules, Study
from benchmarks.methods.tasks import Cell, MethodTask, Suite

TASK = MethodTask("gpt2-4x32", "code", "causal-lm", 8, 2, 16, 4e-3, held_out=8, train_rows=40, curve=2)
SUITE = Suite((Cell(TASK, "60%"), Cell(TASK, "100%")), (1, 2), (101,), 2)

NAMES = [f"h.{layer}.{name}" for layer in range(4) for name in ("attn.c_attn", "mlp.c_fc")]


def costs() -> dict[str, Any]:
    """Four layers of two modules: each layer that is below an adapted one costs 100, each rank 1."""
    modules = [[name, index // 2, 32, 64] for index, name in enumerate(NAMES)]
    needs = [[index // 2 <= layer for index in range(8)] for layer in range(4)]
    state = {
        "unit": "bytes",
        "moments": ["backward"],
        "constant": [50.0],
        "per_rank": [[1.0] * 8],
        "group_bytes": [[100.0] * 4],
        "needs": needs,
    }
    return {"modules": modules, "cost": state, "reference": 514.0, "cpu_s": 1.0}


MODULES = Modules(tuple(ModuleSpec(*fields) for fields in costs()["modules"]), cost_from_state(costs()["cost"]), 514.0)


def row_of(work: Work, gains: dict[str, float]) -> dict[str, Any]:
    """A row that is made up: the loss depends on the rate, the seed and `gains` of the trainer or the plan."""
    if work.kind == "costs":
        return costs()
    if work.kind == "plan":
        return {"plan": "0x4 4x4", "predicted": 266.0, "limit": 300.0, "cpu_s": 2.0}
    if work.kind in ("step", "recompute"):
        figures = {"measured": 260, "measured_reference": 514, "step_ratio": 0.7, "reference_s": 0.01}
        return {**figures, "predicted": 266.0, "limit": 300.0, "layers": 1, "cpu_s": 0.5}
    if work.kind == "search":
        return {"plan": "0x4 8x4", "rate": TASK.rate, "tried": [], "cpu_s": 9.0}
    plan = work.get("plan") or "0x4 8x4"
    gain = gains.get(work.get("trainer"), 0.0) + gains.get(plan, 0.0)
    noise = zlib.crc32(f"{work.get('seed')}".encode()) % 100 / 1000
    loss = float(np.exp(1 + noise - gain + 0.1 * np.log2(work.get("rate") / TASK.rate) ** 2))
    ranks = plan if plan_ranks(plan).size == 8 else "0x4 8x4"
    own = {"predicted": None} if work.get("trainer") in ("adalora", "miss") else {}
    return {
        **own,
        "loss": loss,
        "accuracy": 0.5,
        "untrained_loss": 9.0,
        "curve": [[0, 0.0, 9.0], [4, 0.1, 2 * loss], [8, 0.2, loss]],
        "ranks_first": ranks,
        "ranks": ranks,
        "moved": 0,
        "bump": 0.0,
        "parameters": 1000,
        "setup_s": 0.1,
        "train_s": 1.0,
        "step_s": 0.01,
        "energy_j": None,
        "cpu_s": 3.0,
    }


def new_study(suite: Suite = SUITE) -> Study:
    """A study without rows."""
    return Study(RowStore(None, None), suite)
