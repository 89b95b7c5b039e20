"""What may tell runs that went wrong from others, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...agents.evaluation.results import Row
from ...allocation.log import DecisionRecord
from ...common.arrays import IntArray


def traits_of(row: Row, decisions: Sequence[DecisionRecord]) -> dict[str, float]:
    """The traits of a run by name; yes is 1, and those of its votes are absent where there were none.

    Args:
        row: its result.
        decisions: in order, at least one.
    """
    first = decisions[0]
    ranks, blocks = first.rank_after, first.observation.problem.blocks
    adapted = ranks > 0
    found = {
        "planted task": float(row.kind == "planted"),
        "budget counts bytes": float(row.cost_kind != "parameters"),
        "budget, share of plain LoRA": row.budget,
        "layers of the base": float(row.depth),
        "share of modules adapted": float(adapted.mean()),
        "share of layers adapted": len(np.unique(blocks[adapted])) / len(np.unique(blocks)),
        "highest rank": float(ranks.max()),
        "rank on the top tenth of modules": concentration(ranks),
        "later decisions that moved": float(sum(changed(each) > 0 for each in decisions[1:])),
    }
    votes = first.deliberation
    if votes is not None:
        found |= {
            "expected gain": float(votes.mean[votes.plan]),
            "spread of the votes": float(votes.std[votes.plan]),
            "lead over the next plan": votes.margin,
            "plans in the tie": float(votes.tied.sum()),
            "distance from uniform rank": float(votes.distances[votes.plan]),
        }
    return found


def changed(logged: DecisionRecord) -> int:
    """How many modules a decision gives another rank."""
    return int(np.count_nonzero(logged.rank_after != logged.rank_before))


def concentration(ranks: IntArray) -> float:
    """Share of all rank that the tenth of the modules with the most of it has, 0 to 1.

    Args:
        ranks: (modules,).
    """
    most = np.sort(ranks)[::-1][: max(1, len(ranks) // 10)]
    return float(most.sum() / max(1, ranks.sum()))
