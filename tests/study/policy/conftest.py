"""The folder of a small evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.evaluation.evaluate import LOGS, ROWS
from rankpilot.agents.evaluation.replayed import SHUFFLED, STATIC, Replayed
from rankpilot.agents.evaluation.runs import compare
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.rules import RULES
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.env.tasks.finetune import Reference
from rankpilot.env.tasks.proxy_task import ProxyTask

SIZES: dict[str, Any] = {"base": "llama-4x32", "steps": 8, "batch_size": 2, "length": 8, "eval_rows": 8}
SCHEDULE = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.5))


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks, two seeds each, of the packaged policy, its final ranks, and two rules; budgets of two kinds."""
    folder = tmp_path_factory.mktemp("evaluation")
    one = ProxyTask("planted", 1, corpus="documentation", budget=0.4, reference=Reference(0.3, 0.2, 0.1), **SIZES)
    tasks = [replace(one, seed=seed, unit="bytes" if seed == 4 else "parameters") for seed in range(1, 5)]
    rest: dict[str, Any] = {"workers": 1, "seeds": 2, "file": folder / ROWS}
    compare([load_policy("default"), RULES["uniform"]], tasks, SCHEDULE, logs=folder / LOGS, **rest)
    replays = [Replayed(folder / LOGS / "default", how) for how in (STATIC, SHUFFLED)]
    compare([*replays, RULES["top-half"]], tasks, SCHEDULE, **rest)
    return folder
