"""A plan follows from the shapes of modules: making one loads no tensor library."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

import numpy as np
from rankpilot.decide.plan.problem import rank_bounds
from rankpilot.decide.plan.problem import best_plan
from rankpilot.decide.plan.plan import top_down
from rankpilot.decide.plan.plan import check_budget, project, uniform_ranks
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.decide.plan.worth import Modules, packaged_worth
from rankpilot.lora.spec import ModuleSpec
from rankpilot.cost.cost import ParameterCost, plan_cost

modules = [ModuleSpec(f"layers.{block}.{name}", block, 64, 64) for block in range(4) for name in ("q_proj", "v_proj")]
low, high = rank_bounds(modules, {"layers.0.v_proj": (1, 4)})
problem = AllocationProblem.of(modules, ParameterCost.of(modules), 128 * 8 * 5, low=low, high=high)
check_budget(problem, [module.name for module in modules])
wanted = np.full(len(modules), 64)
utility = np.log1p(problem.ladder.array)[None].repeat(len(modules), axis=0)
plans = project(problem, wanted, np.zeros(len(modules))).ranks, top_down(problem), best_plan(problem, utility)
for ranks in (*plans, uniform_ranks(problem)):
    assert ranks.any() and plan_cost(problem.cost, ranks) <= problem.limit
worth = Modules(np.arange(8) % 2 == 1, problem.blocks / 3, 64.0)
assert packaged_worth().parts(worth.features(np.stack(plans))).any()
print([name for name in ("torch", "transformers", "peft", "psutil") if name in sys.modules])
"""


def test_plans_are_made_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "[]\n"
