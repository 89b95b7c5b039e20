"""Observations of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rankpilot.env.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.lora.cost import ParameterCost
from rankpilot.lora.ladder import RankLadder
from rankpilot.lora.plan import PlanProblem


@pytest.fixture(scope="session")
def make_observation() -> Callable[..., Observation]:
    """A random state of a run with any number of modules in layers of four; parameters are the budget."""

    def make(modules: int = 8, seed: int = 0, **problem: Any) -> Observation:
        generator = np.random.default_rng(seed)
        ranks = generator.choice([0, 1, 2, 4, 8], size=modules)
        cost = ParameterCost(generator.integers(50, 150, size=(1, modules)).astype(np.float64))
        options = {
            "ranks": ranks,
            "max_ranks": np.full(modules, 32),
            "blocks": np.arange(modules) // 4,
            "cost": cost,
            "limit": float(6 * cost.per_rank.sum()),
            "ladder": RankLadder(),
        } | problem
        return Observation(
            modules=np.clip(generator.normal(size=(modules, len(MODULE_FEATURES))), -3, 3).astype(np.float32),
            run=generator.uniform(0, 1, size=len(RUN_FEATURES)).astype(np.float32),
            problem=PlanProblem(**options),
            names=tuple(f"layers.{m // 4}.m{m % 4}" for m in range(modules)),
        )

    return make
