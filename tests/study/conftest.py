"""A run folder as a fine-tune of MiniLM leaves it: 36 modules, four decisions, 200 steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.log import DecisionLog, DecisionRecord
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.agents.policy import Decision
from rankpilot.common.files import write_json, write_json_lines
from rankpilot.cost.cost import ByteCost
from rankpilot.lora.spec import RankLadder
from rankpilot.plan.problem import AllocationProblem

ATTENTION = [f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
KINDS = (*ATTENTION, "intermediate.dense", "output.dense")
MODULES = tuple(f"encoder.layer.{layer}.{kind}" for layer in range(6) for kind in KINDS)
BLOCKS = np.repeat(np.arange(6), 6)
STEPS = (0, 36, 68, 100)
MIB = 2**20


def plans() -> np.ndarray:
    """Ranks after each decision, (4, 36): first the top half, then top-layer query up and value down."""
    first = np.where(BLOCKS >= 3, 4, 0)
    rows = [first, first.copy(), first.copy(), first.copy()]
    for row, (query, value) in zip(rows[1:], [(8, 4), (16, 2), (16, 0)], strict=True):
        row[30], row[32] = query, value
    return np.array(rows)


def features(decision: int) -> np.ndarray:
    """Sensitivity of the top query is far above the rest; a flag and a constant say nothing."""
    table = np.zeros((36, len(MODULE_FEATURES)))
    table[:, :2] = np.random.default_rng(decision).normal(0, 0.1, (36, 4))[:, :2]
    table[30, 0] = 3.0
    table[32, 1] = -3.0
    table[:, MODULE_FEATURES.index("wide")] = BLOCKS == 5
    table[:, MODULE_FEATURES.index("shape")] = 1.0
    return table.astype(np.float32)


def run_features(progress: float) -> np.ndarray:
    """All that is known of the run is how far it is."""
    return np.array([progress] + [0.0] * (len(RUN_FEATURES) - 1), dtype=np.float32)


def problem_of(ranks: np.ndarray) -> AllocationProblem:
    constant, per_rank = np.array([1e6]), np.full((1, 36), 1e5)
    cost = ByteCost(("loss",), constant, per_rank, np.zeros((1, 0)), np.zeros((0, 36), dtype=bool))
    return AllocationProblem(ranks, np.full(36, 64), BLOCKS, cost, 100 * MIB, RankLadder())


def write_decisions(
    folder: Path, problem: Callable[[np.ndarray], AllocationProblem] = problem_of, scale: float = 1.0
) -> None:
    log, ranks = DecisionLog(folder), plans()
    for decision, step in enumerate(STEPS):
        before = ranks[decision - 1] if decision else np.ones(36, dtype=int)
        asked = ranks[decision].copy()
        asked[:3] += 1
        observation = Observation(features(decision), run_features(step / 200), problem(before), MODULES)
        log.append(
            DecisionRecord(
                run="demo", policy="pilot", policy_sha256=None, number=decision, step=step, seed=3,
                loss=None if decision == 0 else 0.7 - 0.1 * decision,
                measured_cost=None if decision == 0 else 89 * MIB, observation=observation,
                decision=Decision(asked, np.zeros(36), 4.0, 4.0, -9.0, 0.5, 0.1),
                rank_clipped=asked, rank_after=ranks[decision], predicted_cost=(90 + 2 * decision) * MIB * scale,
            )
        )  # fmt: skip


def write_metrics(path: Path, level: float, peak: float) -> None:
    rng, lines = np.random.default_rng(5), []
    for step in range(1, 201):
        loss = level + 0.6 * np.exp(-step / 40) + rng.normal(0, 0.05)
        line = {"step": step, "loss": float(loss), "peak_bytes": int((peak + rng.random()) * MIB)}
        if step % 20 == 0:
            line["eval_loss"] = float(level + 0.6 * np.exp(-step / 40))
        lines.append(line)
    write_json_lines(path, lines)


def run_summary(loss: float, peak: float, parameters: int, accuracy: float) -> dict[str, object]:
    return {
        "held_out_loss": loss,
        "held_out_accuracy": accuracy,
        "adapter_parameters": parameters,
        "peak_bytes": int(peak * MIB),
        "budget_bytes": 100 * MIB,
        "median_step_s": 0.0512,
        "train_s": 12.34,
        "ranks": dict(zip(MODULES, plans()[-1].tolist(), strict=True)),
    }


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The finished run folder."""
    folder = tmp_path / "demo"
    write_decisions(folder / "decisions")
    write_metrics(folder / "metrics-rankpilot.jsonl", 0.38, 90)
    write_metrics(folder / "metrics-uniform.jsonl", 0.40, 95)
    write_json(folder / "config.json", {"model": "MiniLM", "budget": "100MiB", "steps": 200})
    runs = {
        "rankpilot": run_summary(0.3841, 91.0, 120_000, 0.861),
        "uniform": run_summary(0.4041, 96.0, 100_000, 0.852),
    }
    summary = {"model": "MiniLM", "data": "sst2", "policy": "pilot", "seed": 3, "runs": runs}
    write_json(folder / "summary.json", summary)
    return folder


PLANS = 30


def explanation(decision: int, modules: int = 36) -> dict[str, Any]:
    """A decision over 30 plans, of which plan 2 was taken; the further down the list, the worse a plan."""
    rng = np.random.default_rng(decision)
    taken = plans()[decision].tolist() if modules == 36 else [4] * modules
    listed = []
    for index in range(PLANS):
        votes = (0.3 - 0.01 * abs(index - 2) + 0.02 * np.array([-1, 0, 0.5, 1.0])).tolist()
        mean, sd = float(np.mean(votes)), float(np.std(votes))
        ranks = taken if index == 2 else [rank + 4 * (rng.random() < 0.1) for rank in taken]
        listed.append(
            {"ranks": ranks, "votes": votes, "mean": mean, "sd": sd, "bound": mean - sd, "probability": None,
             "tied": index in (1, 2, 3), "cost": 1e6}
        )  # fmt: skip
    return {
        "decision": decision, "step": 0, "first": decision == 0, "policy": "default",
        "verdict": f"Verdict on decision {decision}.", "sentences": ["Four networks agree."],
        "candidates": [
            {"name": "signal-mean", "gains": {"signal_mean": 0.5, "actor": -1.0}, "rank_floor": 8.0, "depth_bias": 4.0,
             "plan": 2},
            {"name": None, "gains": {}, "rank_floor": 8.0, "depth_bias": 4.0, "plan": PLANS - 1},
        ],
        "plans": listed, "taken": 2, "reference": PLANS - 1, "caution": 1.0, "margin": 0.02,
        "unit_of_votes": "standard deviations", "actor": {"directions": ["sensitivity"], "gains": [float("nan")]},
        "shapley": {"quantity": "lower bound", "baseline": "the mean module.", "alone": 0.05, "total": 0.25,
                    "groups": [{"name": "signals", "value": 0.25, "mean": 0.3}, {"name": "shape", "value": -0.05}]},
        "what_ifs": [{"text": "With less memory it would have rank 4.", "side_effects": 11}],
        "projection": None, "stability": {"same": 0.9, "noise": 0.05, "sure": [True] * (modules - 1) + [False]},
    }  # fmt: skip
