"""A run folder as a fine-tune of MiniLM leaves it: 36 modules, four decisions, 200 steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.common.files import write_json, write_json_lines
from rankpilot.cost.cost import ByteCost
from rankpilot.decide.choice import PLAIN, Choice
from rankpilot.decide.log import DecisionLog, DecisionRecord
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.plan.goal import Goal
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.decide.plan.worth import FEATURES
from rankpilot.decide.policy import Decision
from rankpilot.lora.spec import RankLadder

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
                decision=Decision(asked, np.zeros(36), 4.0, 4.0),
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


def four_plans(**changes: Any) -> Choice:
    """A choice between plans of four modules, of which the third is surely better and the second the cheapest."""
    parts = np.zeros((4, len(FEATURES)))
    parts[:, list(FEATURES).index("rank of MLP modules")] = [0, 0.004, -0.03, 0.05]
    parts[2, list(FEATURES).index("few modules")] = 0.01
    plans = np.array([[8, 8, 8, 8], [4, 4, 4, 4], [16, 0, 16, 0], [1, 1, 1, 1]])
    names = (PLAIN, "rank 4 on all modules", "rank 16 on the MLP modules", "rank 1 on all modules")
    known = {"costs": np.array([4000.0, 2000, 4500, 1000]), "seconds": np.array([0.04, 0.03, 0.05, 0.02])}
    known |= {"spread": np.array([0, 0.003, 0.01, 0.02]), "fits": np.ones(4, dtype=np.bool_), "goal": Goal()}
    found = Choice(names=names, plans=plans, parts=parts, **(known | changes))
    return found if "taken" in changes else replace(found, taken=found.best)


PLANS = 30


def explanation(decision: int) -> dict[str, Any]:
    """A decision over 30 plans, the best first. The second was taken; the last one, plain LoRA, does not fit."""
    taken = plans()[decision].tolist()
    listed = [
        {"name": f"plan {index}", "ranks": taken if index == 1 else [4] * 36, "expected": 0.01 * index - 0.02,
         "spread": 0.01, "surely": 0.01 * index - 0.01, "fits": index < PLANS - 1, "within": None, "cost": 1e6,
         "seconds": None}
        for index in range(PLANS)
    ]  # fmt: skip
    return {
        "decision": decision, "step": 0, "first": decision == 0, "policy": "default",
        "verdict": f"Verdict on decision {decision}.", "sentences": ["Fine-tunes differ."],
        "goal": "the lowest loss", "plans": listed, "taken": 1,
        "parts": [{"name": "rank of MLP modules", "value": -0.02}, {"name": "few modules", "value": 0.01}],
        "what_ifs": [{"text": "With less memory it would have rank 4.", "side_effects": 11}],
    }  # fmt: skip
