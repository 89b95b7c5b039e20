"""The plan with the most utility inside a budget, exactly.

The utility of a plan is a sum over its modules; its cost is not. Modules q, k and v share an input, the tensors above
the lowest adapted module are kept once for all modules, and the peak is the highest of several moments. All of that is
linear in two sets of variables: whether a module has a rung, and whether a group is paid. So the best plan is the
solution of a mixed-integer linear program, which HiGHS finds (`scipy.optimize.milp`).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, kron

from ..common.arrays import FloatArray, IntArray
from ..errors import ConfigError
from .plan_builder import PlanBuilder
from .problem import AllocationProblem

GAP = 1e-6
"""The most utility that the result may lack, as a share of the best: from here on HiGHS stops to search."""


def best_plan(problem: AllocationProblem, utility: FloatArray) -> IntArray:
    """The plan with the most utility that fits.

    Args:
        problem: costs, limit, ladder and bounds; `max_step`, `pinned`, `hysteresis` and current ranks are ignored.
        utility: of each rung on each module, (modules, rungs): 0 at rank 0, and not falling along the ladder.

    Returns:
        Ranks on the ladder, int64 (modules,), of which none can rise further; the lower bounds if not even they fit.

    Raises:
        ConfigError: the utilities have another shape, are not finite, fall, or are not 0 at rank 0.
    """
    expected = (len(problem.ranks), len(problem.ladder.ranks))
    if np.shape(utility) != expected:
        raise ConfigError(f"utility holds a number for each module and rung, {expected}; got {np.shape(utility)}.")
    if not np.isfinite(utility).all() or (np.diff(utility, axis=1) < 0).any() or utility[:, 0].any():
        raise ConfigError("utility is 0 at rank 0, finite, and does not fall along the ladder.")
    problem = problem.fresh()
    ladder = problem.ladder.array
    if not problem.fits(ladder[problem.bottoms]):
        return ladder[problem.bottoms]
    rungs, limit = _solve(problem, utility, problem.limit), problem.limit
    while not problem.fits(ladder[rungs]):  # by the solver's tolerance, a millionth of the limit
        limit -= 1e-6 * problem.limit
        rungs = _solve(problem, utility, limit)
    draft = PlanBuilder(problem, np.zeros(len(rungs)), rungs)
    draft.fill(problem.tops)
    return draft.ranks


def _solve(problem: AllocationProblem, utility: FloatArray, limit: float) -> IntArray:
    """The rungs of the best plan within a limit, int64 (modules,); its variables: each module's rungs, then groups."""
    cost, steps = problem.cost, np.arange(1, len(problem.ladder.ranks))
    modules, groups = len(utility), cost.group_bytes.shape[1]
    allowed = (steps >= problem.bottoms[:, None]) & (steps <= problem.tops[:, None])
    one_rung = kron(csr_array(np.eye(modules)), np.ones((1, len(steps))), format="csr")
    group, member = np.nonzero(cost.needs)
    paid = csr_array((np.ones(len(group)), (np.arange(len(group)), group)), shape=(len(group), groups))
    held = np.kron(cost.per_rank, problem.ladder.array[1:]) / limit
    result = milp(
        -np.append(utility[:, 1:].ravel(), np.zeros(groups)) / max(float(utility.max()), 1e-300),
        constraints=[
            LinearConstraint(block_array([[one_rung, csr_array((modules, groups))]]), problem.bottoms > 0, 1),
            LinearConstraint(block_array([[one_rung[member], -paid]]), -np.inf, 0),
            LinearConstraint(np.hstack([held, cost.group_bytes / limit]), -np.inf, 1 - cost.constant / limit),
        ],
        integrality=np.append(np.ones(allowed.size), np.zeros(groups)),
        bounds=Bounds(0, np.append(allowed.ravel(), np.ones(groups))),
        options={"mip_rel_gap": GAP},
    )
    chosen = np.round(result.x[: allowed.size]).reshape(allowed.shape)
    return np.asarray((chosen * steps).sum(axis=1), dtype=np.int64)
