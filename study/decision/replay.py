"""What another policy or rule would have decided in a run, in the states that the run went through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from rich.table import Table

from ...allocation.decision_log import DecisionLog, LoggedDecision
from ...allocation.deliberation import plan_distance
from ...allocation.policy import Policy
from ...common.arrays import IntArray
from ...common.tables import make_table
from ...errors import RunFolderError
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
        RunFolderError: there is no log.
    """
    lacking: dict[str, list[int]] = {}
    unread: list[str] = []
    table = log.read(lambda error: unread.append(str(error)))
    rows = table.filter(pc.equal(table["module_index"], 0)).select(["decision", "problem", "correction"]).to_pylist()
    agreements = []
    for row in rows:
        number, reason = row["decision"], _obstacle(row)
        try:
            logged = None if reason else log.logged(number)
        except RunFolderError as error:
            reason, logged = str(error), None
        if logged:
            agreements.append(_agreement(number, logged, policy))
            reason = "" if logged.state else "log schema 3 holds no candidates and votes; only ranks are compared"
        if reason:
            lacking.setdefault(reason, []).append(number)
    lines = [f"Decision {', '.join(map(str, numbers))}: {reason}." for reason, numbers in lacking.items()]
    return Replay(table["policy"][0].as_py(), policy.name, tuple(agreements), (*unread, *lines))


def _obstacle(row: Mapping[str, Any]) -> str:
    """Why a decision cannot be taken again; empty if nothing stands in the way."""
    if row["problem"] is None:
        return "log schema 2 does not hold the problem that was solved"
    return "the guard or a person changed the ranks; no policy decided" if row["correction"] else ""


def _agreement(number: int, logged: LoggedDecision, policy: Policy) -> Agreement:
    ranks, names = logged.ranks("rank_after"), logged.observation.names
    return Agreement(number, logged.value("step"), names, ranks, redecide(logged, policy).ranks)
