"""The decision log of an episode, as a real fine-tune has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...allocation.controller import RankController
from ...allocation.decision_log import DecisionLog
from ...allocation.decision_record import DecisionRecord
from ...allocation.observation import Observation
from ...allocation.plan import Plan
from ...allocation.policy import Decision, Policy


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """Writes down the decisions of one episode.

    Attributes:
        log: the log; what it held is dropped at the first decision.
        policy: decides.
        run: name of the run.
    """

    log: DecisionLog
    policy: Policy
    run: str

    def append(
        self,
        controller: RankController[Any],
        observation: Observation,
        decision: Decision,
        plan: Plan,
        *,
        step: int,
        loss: float | None,
    ) -> None:
        """Write down a decision that has just been applied; see `DecisionRecord.of`."""
        number = controller.decision - 1
        if number == 0:
            self.log.truncate(0)
        self.log.append(
            DecisionRecord.of(
                controller,
                observation,
                decision,
                plan,
                policy=self.policy,
                number=number,
                step=step,
                run=self.run,
                loss=loss,
            )
        )
