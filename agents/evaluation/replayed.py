"""The final ranks of logged runs, taken from the start: did changes on the way matter, did the choice of modules?

Two runs of each task are compared with the logged one. `static` has its final ranks from the first step on: what is
lost there is what later decisions were worth. `shuffled` has the same ranks dealt anew among the modules of each kind,
under a budget of bytes among the adapted ones: what is lost there is what the choice between layers was worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...allocation.log import DecisionLog
from ...allocation.problem import AllocationProblem
from ...env.tasks.proxy_task import ProxyTask
from ...errors import RunFolderError
from ..rules.given_plan import GivenPlan, shuffled_plan
from .hindsight import Attempt

STATIC, SHUFFLED = "static", "shuffled"


@dataclass(frozen=True)
class Replayed:
    """Runs each task at the final ranks of a logged run.

    Attributes:
        logs: the decision logs of one policy's runs, as `rankpilot evaluate --logs` writes them: a folder for each run.
        how: `STATIC` or `SHUFFLED`.
        attempts: one.
    """

    logs: Path
    how: str = STATIC
    attempts: int = 1

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.logs.name} {self.how}"

    def prepare(self, task: ProxyTask, problem: AllocationProblem) -> Sequence[Attempt]:
        """The task at the ranks that its logged run ended with.

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
        return [(task, GivenPlan(self.name, ranks))] if any(ranks.values()) else []
