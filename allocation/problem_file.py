"""Files of allocation problems: with one, a decision that was logged can be taken again.

A file holds what stays the same from decision to decision: the cost of plans and its limit, the ladder, and the modules
with their bounds. The rest (current ranks, `max_step`, `hysteresis`, pinned modules) belongs to one decision.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..common.arrays import Arrays
from ..common.files import parse_json
from ..common.tensor_files import read_arrays
from ..errors import RunFolderError, first_line
from ..lora.ladder import RankLadder
from ..memory.cost import check_cost, cost_from_state, cost_state
from .problem import AllocationProblem

_COST = "cost."
_METADATA = "rankpilot.problem"  # one key alone: the order of several is not fixed, and equal problems are equal bytes


def problem_bytes(problem: AllocationProblem) -> bytes:
    """The content of a problem's file; the same for problems that differ in one decision's part alone."""
    from safetensors.numpy import save  # late: a Trainer does not load it

    state = cost_state(problem.cost)
    arrays: Arrays = {_COST + name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    arrays |= {
        "limit": np.array([problem.limit]),
        "ladder": problem.ladder.array,
        "max_ranks": problem.max_ranks,
        "blocks": problem.blocks,
    }
    arrays |= {name: bound for name, bound in (("low", problem.low), ("high", problem.high)) if bound is not None}
    scalars = {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content: bytes = save(contiguous, {_METADATA: json.dumps(scalars)})
    return content


def read_problem(path: Path) -> AllocationProblem:
    """The problem of a file, as at a first decision: no module is adapted.

    Raises:
        RunFolderError: the file is missing or corrupt, or holds no problem.
    """
    try:
        arrays, metadata = read_arrays(path)
        scalars = parse_json(metadata[_METADATA])
        cost = {name.removeprefix(_COST): array for name, array in arrays.items() if name.startswith(_COST)}
        problem = AllocationProblem(
            ranks=np.zeros_like(arrays["max_ranks"]),
            max_ranks=arrays["max_ranks"],
            blocks=arrays["blocks"],
            cost=cost_from_state({**scalars, **cost}),
            limit=float(arrays["limit"].item()),
            ladder=RankLadder(tuple(arrays["ladder"].tolist())),
            low=arrays.get("low"),
            high=arrays.get("high"),
        )
        _check(problem)
        return problem
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise RunFolderError(
            f"{path} is missing, or is no file of an allocation problem: {first_line(error)}"
        ) from error


def _check(problem: AllocationProblem) -> None:
    """Refuse a problem whose parts do not fit one another; ValueError."""
    count, cost = len(problem.max_ranks), problem.cost
    whole = {"max_ranks": problem.max_ranks, "blocks": problem.blocks, "low": problem.low, "high": problem.high}
    for name, values in whole.items():
        if values is not None and (values.dtype != np.int64 or values.shape != (count,) or values.min() < 0):
            raise ValueError(f"{name} is no rank or layer for each of {count} modules")
    if problem.ladder.array.dtype != np.int64 or not all(type(rank) is int for rank in problem.ladder.ranks):
        raise ValueError("the ladder is not of whole numbers")
    check_cost(cost, count)
    if np.isnan(problem.limit):
        raise ValueError(f"the limit is {problem.limit}")
