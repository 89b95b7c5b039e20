"""Files of allocation problems: with one, a decision that was logged can be taken again.

A file holds what stays the same from decision to decision: the cost of plans and its limit, the ladder, and the modules
with their bounds. The rest (current ranks, `max_step`, `hysteresis`, pinned modules) belongs to one decision.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..common.arrays import Arrays
from ..errors import RunFolderError
from ..lora.ladder import RankLadder
from ..memory.cost import cost_from_state, cost_state
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
        with safe_open(path, framework="np") as file:
            scalars = json.loads((file.metadata() or {})[_METADATA])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file is no dict)
        cost = {name.removeprefix(_COST): array for name, array in arrays.items() if name.startswith(_COST)}
        return AllocationProblem(
            ranks=np.zeros_like(arrays["max_ranks"]),
            max_ranks=arrays["max_ranks"],
            blocks=arrays["blocks"],
            cost=cost_from_state({**scalars, **cost}),
            limit=float(arrays["limit"].item()),
            ladder=RankLadder(tuple(arrays["ladder"].tolist())),
            low=arrays.get("low"),
            high=arrays.get("high"),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunFolderError(f"{path} is missing, or is no file of an allocation problem: {error}") from error
