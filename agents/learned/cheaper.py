"""The same problem under lower limits: what makes plans of any cost, with all that makes plans for one."""

from __future__ import annotations

from ...allocation.plan import least_ranks
from ...allocation.problem import AllocationProblem
from ...allocation.time_limit import dearer, under_limit
from ...memory.cost import TimedCost, moment_costs, unit_cost
from .structures import all_linear


def with_less(problem: AllocationProblem, share: float) -> AllocationProblem:
    """The problem with a lower limit, in its own unit; a limit of the time of a step stays as it is.

    Args:
        problem: of a first decision.
        share: where the limit lies between the cheapest plan (0) and plain LoRA or the limit itself (1), whichever is
            lower.
    """
    least = unit_cost(problem.cost, least_ranks(problem))
    most = min(problem.limit, unit_cost(problem.cost, all_linear(problem)))
    return under_limit(problem, least + share * max(0.0, most - least))


def with_less_time(problem: AllocationProblem, share: float) -> AllocationProblem:
    """The problem with a lower limit of the time of a step; see `with_less`.

    Args:
        problem: with the time of a step among its costs.
        share: see `with_less`.
    """
    assert isinstance(problem.cost, TimedCost)
    least, plain = (
        float(moment_costs(problem.cost, ranks)[-1]) for ranks in (least_ranks(problem), all_linear(problem))
    )
    most = min(problem.limit, plain)
    return dearer(problem, problem.limit / (least + share * max(0.0, most - least)))
