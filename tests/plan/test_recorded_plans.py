"""Plans are those on record: 1,000 random problems, packed and projected before the code was rearranged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
from rankpilot.cost.cost import ParameterCost
from rankpilot.plan.plan import pack, project

from .synthetic_costs import random_cost, transformer_cost
from .test_plan_properties import random_problem, random_wish

RECORD = Path(__file__).parents[1] / "recorded" / "plans.json.gz"


def test_plans_of_a_thousand_random_problems() -> None:
    recorded = json.loads(gzip.decompress(RECORD.read_bytes()))
    generator = np.random.default_rng(16)
    plans = []
    for make_cost, largest, count in ((random_cost, 14, 600), (ParameterCost, 14, 200), (transformer_cost, 21, 200)):
        for _ in range(count):
            problem = random_problem(generator, make_cost, largest)
            wanted, scores = random_wish(generator, problem)
            rank_floor = generator.uniform(0.1, 70)
            plan = project(problem, wanted, scores)
            packed = pack(problem, scores, rank_floor)
            plans.append(
                {
                    "packed": packed.tolist(),
                    "asked": plan.clipped.tolist(),
                    "ranks": plan.ranks.tolist(),
                    "cost": plan.cost,
                }
            )
    assert len(plans) == 1000
    assert plans == recorded
