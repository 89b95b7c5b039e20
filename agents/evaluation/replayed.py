"""Competitors that know more than an observation tells: what was planted in a task, or how a logged run of it ended.

None of them is a policy to use; they tell what one could reach, and what its decisions were worth.

The final ranks of a logged run are taken from the start: did changes on the way matter, did the choice of modules?
Two runs of each task are compared with the logged one. `static` has its final ranks from the first step on: what is
lost there is what later decisions were worth. `shuffled` has the same ranks dealt anew among the modules of each kind,
under a budget of bytes among the adapted ones: what is lost there is what the choice between layers was worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ...allocation.log import DecisionLog
from ...allocation.policy import Policy
from ...allocation.problem import AllocationProblem
from ...env.tasks.oracle import oracle_plan
from ...env.tasks.proxy_task import ProxyTask
from ...errors import RunFolderError
from ..rules.given_plan import GivenPlan, shuffled_plan
from ..rules.hand_written import FixedPlan

STATIC, SHUFFLED = "static", "shuffled"


@runtime_checkable
class TaskRule(Protocol):
    """A competitor that sees the task."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def policy_for(self, task: ProxyTask, problem: AllocationProblem) -> Policy | None:
        """Who decides in a run of a task; None if the rule does not apply to it.

        Args:
            task: with its reference.
            problem: the plans that its first decision allows.
        """


@dataclass(frozen=True)
class Oracle:
    """The plan that captures most of what was planted; see `env.tasks.oracle`.

    Attributes:
        name: what tables call it.
    """

    name: str = "oracle"

    def policy_for(self, task: ProxyTask, problem: AllocationProblem) -> Policy | None:
        """Its plan, on planted tasks."""
        if task.kind != "planted":
            return None
        ranks = oracle_plan(task, problem)
        return FixedPlan(self.name, lambda _: ranks)


@dataclass(frozen=True)
class Replayed:
    """Runs each task at the final ranks of a logged run.

    Attributes:
        logs: the decision logs of one policy's runs, as `rankpilot evaluate --logs` writes them: a folder for each run.
        how: `STATIC` or `SHUFFLED`.
    """

    logs: Path
    how: str = STATIC

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.logs.name} {self.how}"

    def policy_for(self, task: ProxyTask, problem: AllocationProblem) -> Policy | None:
        """The ranks that the logged run of the task ended with.

        A last plan that had the bytes of signal buffers may have to give up a rung.

        Raises:
            RunFolderError: there is no log of a run of this task and seed.
        """
        matches = sorted(self.logs.glob(f"*-{task.seed}"))
        logs = [log for log in map(DecisionLog, matches) if len(log)]
        if len(logs) != 1:
            raise RunFolderError(
                f"{self.logs} holds {len(logs)} logs of task {task.id} with seed {task.seed}, and one is needed. Run "
                "`rankpilot evaluate` with --logs on the same tasks and seeds first."
            )
        last = logs[0].read()[-1]
        ranks = shuffled_plan(last, task.seed) if self.how == SHUFFLED else last.plan()
        return GivenPlan(self.name, ranks) if any(ranks.values()) else None
