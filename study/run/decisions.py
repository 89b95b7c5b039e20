"""Decisions in words: what moved, and which of its features stood out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...allocation.decision_line import decision_line
from ...allocation.log_part import FEATURE_PREFIX
from ...allocation.unusual_features import unusual_features
from ...common.arrays import IntArray
from ...common.module_names import short_names
from ...common.units import cost_text

MOVES_SHOWN = 3
"""Moves that a decision's list has at most."""


def decision_lines(log: pa.Table) -> list[str]:
    """A line for each decision of a log, as `DecisionLog.read` returns it."""
    return [line_of(table) for table in each_decision(log)]


def describe_decisions(log: pa.Table) -> list[str]:
    """A Markdown paragraph with a list for each decision of a log, as `DecisionLog.read` returns it.

    A feature's distance from the mean shows what was unusual about a module, not what the policy weighed.
    """
    return [_describe(table) for table in each_decision(log)]


def each_decision(log: pa.Table) -> list[pa.Table]:
    """The rows of each decision of a log, as `DecisionLog.read` returns it: sorted by decision."""
    numbers = log["decision"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
    return [log.slice(start, end - start) for start, end in pairwise([*starts, len(numbers)])]


def line_of(table: pa.Table) -> str:
    """One decision in one line; see `decision_line`."""
    first: dict[str, Any] = table.slice(0, 1).to_pylist()[0]
    before, after = (table[name].to_numpy() for name in ("rank_before", "rank_after"))
    return decision_line(first["step"], before, after, first["predicted_cost"], first["limit"], first["unit"])


def standing_out(table: pa.Table) -> list[list[tuple[str, float]]]:
    """The unusual features of each row of one decision's table; see `unusual_features`."""
    columns = [name for name in table.column_names if name.startswith(FEATURE_PREFIX)]
    values = np.empty((table.num_rows, len(columns)))
    for index, column in enumerate(columns):
        values[:, index] = table[column].to_numpy()
    return unusual_features([name.removeprefix(FEATURE_PREFIX) for name in columns], values)


def _describe(table: pa.Table) -> str:
    first: dict[str, Any] = table.slice(0, 1).to_pylist()[0]
    before, after = (table[name].to_numpy() for name in ("rank_before", "rank_after"))
    names, features = short_names(table["module"].to_pylist()), standing_out(table)
    # Far moves on the ladder are far in log rank; the +1 lets rank 0 take part.
    move = np.abs(np.log2(after + 1) - np.log2(before + 1))
    lines = [_headline(first, before, after, int(pc.sum(table["changed_by_projection"]).as_py()))]
    farthest = np.array([max((abs(distance) for _, distance in pairs), default=0.0) for pairs in features])
    for index in np.lexsort((-farthest, -move))[:MOVES_SHOWN]:
        if move[index] > 0:
            reason = ", ".join(f"{name} {distance:+.1f} sd" for name, distance in features[index]).replace("-", "−")
            change = f"rank {before[index]} → {after[index]}"
            lines.append(f"- `{names[index]}`: {change} ({reason or 'no feature stood out'})")
    return "\n\n".join(filter(None, (lines[0], "\n".join(lines[1:]))))


def _headline(first: Mapping[str, Any], before: IntArray, after: IntArray, projected: int) -> str:
    loss = f", loss {first['loss']:.3f}" if first["loss"] is not None else ""
    lead = f"**Decision {first['decision']}, step {first['step']}{loss}.**"
    return f"{lead} {moves_sentence(first, before, after, projected)}"


def moves_sentence(first: Mapping[str, Any], before: IntArray, after: IntArray, projected: int) -> str:
    """How many modules moved, and what the plan costs.

    Args:
        first: a row of the decision.
        before: ranks before it, int (modules,).
        after: ranks of the plan, int (modules,).
        projected: modules that the budget gave another rank than was asked for.
    """
    up, down = int((after > before).sum()), int((after < before).sum())
    same = len(after) - up - down
    plan = f"{cost_text(first['predicted_cost'], first['unit'])} of {cost_text(first['limit'], first['unit'])}"
    measured = first["measured_cost"]
    seen = f" (measured before it: {cost_text(measured, first['unit'])})" if measured is not None else ""
    changed = f" The budget changed what was asked for {projected} modules." if projected else ""
    moved = f"{up} up, {down} down, {same} unchanged"
    return f"{moved}; predicted cost {plan}{seen}.{changed}"
