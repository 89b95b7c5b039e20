"""Decisions in words: what moved, and which of its features stood out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...allocation.features import MODULE_FEATURES
from ...allocation.log import DecisionRecord
from ...allocation.unusual_features import unusual_features
from ...common.module_names import short_names
from ...common.units import cost_text

MOVES_SHOWN = 3
"""Moves that a decision's list has at most."""


def describe_decisions(records: Sequence[DecisionRecord]) -> list[str]:
    """A Markdown paragraph with a list for each decision.

    A feature's distance from the mean shows what was unusual about a module, not what the policy weighed.
    """
    return [_describe(record) for record in records]


def standing_out(record: DecisionRecord) -> list[list[tuple[str, float]]]:
    """The unusual features of each module at a decision; see `unusual_features`."""
    return unusual_features(MODULE_FEATURES, record.observation.modules)


def _describe(record: DecisionRecord) -> str:
    before, after = record.rank_before, record.rank_after
    names, features = short_names(record.modules), standing_out(record)
    # Far moves on the ladder are far in log rank; the +1 lets rank 0 take part.
    move = np.abs(np.log2(after + 1) - np.log2(before + 1))
    loss = f", loss {record.loss:.3f}" if record.loss is not None else ""
    head = f"**Decision {record.number}, step {record.step}{loss}.** {moves_sentence(record)}"
    lines = []
    farthest = np.array([max((abs(distance) for _, distance in pairs), default=0.0) for pairs in features])
    for index in np.lexsort((-farthest, -move))[:MOVES_SHOWN]:
        if move[index] > 0:
            reason = ", ".join(f"{name} {distance:+.1f} sd" for name, distance in features[index]).replace("-", "−")
            change = f"rank {before[index]} → {after[index]}"
            lines.append(f"- `{names[index]}`: {change} ({reason or 'no feature stood out'})")
    return "\n\n".join(filter(None, (head, "\n".join(lines))))


def moves_sentence(record: DecisionRecord) -> str:
    """How many modules moved at a decision, what its plan costs, and how many ranks the budget changed."""
    before, after, unit = record.rank_before, record.rank_after, record.problem.cost.unit
    up, down = int((after > before).sum()), int((after < before).sum())
    projected = int((record.rank_clipped != after).sum())
    plan = f"{cost_text(record.predicted_cost, unit)} of {cost_text(record.problem.limit, unit)}"
    measured = record.measured_cost
    seen = f" (measured before it: {cost_text(measured, unit)})" if measured is not None else ""
    changed = f" The budget changed what was asked for {projected} modules." if projected else ""
    moved = f"{up} up, {down} down, {len(after) - up - down} unchanged"
    return f"{moved}; predicted cost {plan}{seen}.{changed}"
