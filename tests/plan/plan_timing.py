"""How long plans take on one core: `OMP_NUM_THREADS=1 python tests/plan/plan_timing.py [layers]`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rankpilot.cost.cost import plan_cost
from rankpilot.lora.spec import RankLadder
from rankpilot.plan.plan import pack, project
from rankpilot.plan.problem import AllocationProblem

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_costs import transformer_cost


def timed_problem(generator, layers, *, checkpointing):
    """A run in its middle: ranks up to 8, a budget from 2 to 100 % of what everything adds to nothing."""
    cost, blocks, max_ranks = transformer_cost(generator, layers, checkpointing=checkpointing)
    ladder = RankLadder()
    ranks = ladder.array[generator.integers(0, 5, size=len(blocks))]
    max_step = (None, 2, 2)[generator.integers(3)]
    problem = AllocationProblem(
        ranks, max_ranks, blocks, cost, 0.0, ladder, max_step, hysteresis=0.2 * (max_step is not None)
    )
    nothing, everything = (
        plan_cost(problem.cost, np.zeros_like(blocks)),
        plan_cost(problem.cost, ladder.array[problem.tops]),
    )
    return replace(problem, limit=float(int(nothing + (everything - nothing) * generator.uniform(0.02, 1.0))))


def time_decisions(layers=143, problems=60, repeats=3, seed=0):
    """Seconds of one decision (`pack`, then `project`), the best of some repeats, (problems,)."""
    generator = np.random.default_rng(seed)
    seconds = np.full(problems, np.inf)
    for index in range(problems):
        problem = timed_problem(generator, layers, checkpointing=index % 2 == 1)
        scores = generator.normal(size=len(problem.ranks)) * generator.choice([0, 0.3, 1, 3])
        rank_floor = 16 * 2 ** generator.uniform(-3, 3)
        for _ in range(repeats):
            start = time.perf_counter()
            wish = pack(problem, scores, rank_floor)
            project(problem, wish, scores)
            seconds[index] = min(seconds[index], time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 143
    times = 1e3 * time_decisions(layers)
    print(f"{7 * layers} modules, pack and project: median {np.median(times):.1f} ms, highest {times.max():.1f} ms")
