"""Plan runs that nobody ran."""

from __future__ import annotations

import math

import numpy as np
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.training.plan_runs import RUNS, PlanRun, RealPlanRun


def real_plan_run(modules: int) -> RealPlanRun:
    """All plans of a fine-tune of a model with so many target modules."""
    generator = np.random.default_rng(0)
    return RealPlanRun(
        task="a task",
        family="a family",
        names=tuple(f"module{number}" for number in range(modules)),
        modules=generator.normal(size=(modules, len(MODULE_FEATURES))).clip(-3, 3).astype(np.float32),
        run=generator.normal(size=len(RUN_FEATURES)).clip(-3, 3).astype(np.float32),
        ranks=generator.choice([0, 8, 16], size=(RUNS, modules)),
        losses=generator.uniform(1, 2, size=RUNS),
        train_losses=np.ones((RUNS, 3), dtype=np.float32),
        initial=3.0,
        choices=np.zeros(RUNS, dtype=np.int8),
    )


def plan_run(number: int = 0, decisions: int = 2, tasks: int = 1, modules: int = 3) -> PlanRun:
    """Random plans of proxy tasks; one run failed."""
    generator = np.random.default_rng(number)
    runs = tasks * RUNS
    losses = generator.uniform(0.2, 0.9, runs)
    losses[number % runs] = math.nan
    return PlanRun(
        generator.normal(size=(decisions, runs, modules, len(MODULE_FEATURES))).clip(-3, 3).astype(np.float32),
        generator.normal(size=(decisions, runs, modules)).astype(np.float32),
        generator.normal(size=(decisions, runs, len(RUN_FEATURES))).clip(-3, 3).astype(np.float32),
        generator.choice([0, 1, 2, 4], size=(decisions, runs, modules)),
        losses,
        np.repeat(generator.uniform(0.8, 1.0, tasks), RUNS),
    )
