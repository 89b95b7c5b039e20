"""What another policy or rule would have decided in a run, in the states that the run went through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ...allocation.deliberation import plan_distance
from ...allocation.log import DecisionLog, DecisionRecord
from ...allocation.policy import Policy
from ...common.arrays import IntArray
from ...common.tables import make_table
from .redecide import redecide


@dataclass(frozen=True, eq=False)
class Agreement:
    """One decision of a run beside that of another policy on the same state.

    Attributes:
        decision: its number.
        step: optimiser steps done before it.
        modules: their names.
        ranks: of the run, int64 (modules,).
        other: of the other policy, int64 (modules,).
    """

    decision: int
    step: int
    modules: tuple[str, ...]
    ranks: IntArray
    other: IntArray

    @property
    def same(self) -> int:
        """How many modules have the same rank in both."""
        return int((self.ranks == self.other).sum())

    @property
    def distance(self) -> float:
        """See `plan_distance`."""
        return float(plan_distance(self.other, self.ranks))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        rows = zip(self.modules, self.ranks.tolist(), self.other.tolist(), strict=True)
        return {
            "decision": self.decision,
            "step": self.step,
            "same": self.same,
            "distance": self.distance,
            "modules": [{"module": name, "rank": rank, "other": other} for name, rank, other in rows],
        }


@dataclass(frozen=True, eq=False)
class Replay:
    """A run beside another policy, decision by decision.

    Attributes:
        run: name of the policy that decided in the run.
        policy: name of the other one.
        agreements: of the decisions that could be taken again.
        lacking: why others could not, a line each.
    """

    run: str
    policy: str
    agreements: tuple[Agreement, ...]
    lacking: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        rows = [agreement.to_json() for agreement in self.agreements]
        return {"run": self.run, "policy": self.policy, "decisions": rows, "lacking": list(self.lacking)}

    def table(self) -> Table:
        """One row for each decision, and below them what is lacking."""
        columns = ("decision", "step", "same ranks", "distance in log2", "mean rank", f"of {self.policy}")
        rows = [
            (
                str(row.decision),
                str(row.step),
                f"{row.same} of {len(row.ranks)}",
                f"{row.distance:.2f}",
                f"{row.ranks.mean():.1f}",
                f"{row.other.mean():.1f}",
            )
            for row in self.agreements
        ]
        table = make_table(f"{self.run} beside {self.policy}, in the states of the run", columns, rows)
        table.caption, table.caption_justify = "\n".join(self.lacking) or None, "left"
        return table


def replay(log: DecisionLog, policy: Policy) -> Replay:
    """Let a policy or rule decide in every state of a logged run.

    It decides from the ranks that the run had, so its decisions do not add up to a run of its own.

    Args:
        log: of the run.
        policy: decides.

    Raises:
        RunFolderError: there is no log, or it cannot be read.
    """
    records = log.read()
    changed = [record.number for record in records if record.correction]
    lacking = f"Decision {', '.join(map(str, changed))}: the guard or a person changed the ranks; no policy decided."
    agreements = tuple(_agreement(record, policy) for record in records if not record.correction)
    return Replay(records[0].policy, policy.name, agreements, (lacking,) if changed else ())


def _agreement(logged: DecisionRecord, policy: Policy) -> Agreement:
    return Agreement(logged.number, logged.step, logged.modules, logged.rank_after, redecide(logged, policy).ranks)
