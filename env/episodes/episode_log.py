"""The decision log of an episode, as a real fine-tune has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...allocation.controller import RankController
from ...allocation.log import DecisionLog, DecisionRecord
from ...allocation.observation import Observation
from ...allocation.plan import Plan
from ...allocation.policy import Decision, Policy
from ...errors import RunFolderError


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """Writes down the decisions of one episode.

    Attributes:
        write: takes each decision, such as `DecisionLog.append`.
        policy: decides.
        run: name of the run.
    """

    write: Callable[[DecisionRecord], object]
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
        self.write(
            DecisionRecord.of(
                controller,
                observation,
                decision,
                plan,
                policy=self.policy,
                number=controller.decision - 1,
                step=step,
                run=self.run,
                loss=loss,
            )
        )


@dataclass(frozen=True)
class _Agent:
    """Whoever acts in an environment."""

    name: str = "agent"

    def decide(self, observation: Observation) -> Decision:
        raise NotImplementedError("the actions of an environment come from outside")


AGENT: Policy = _Agent()
"""The policy that logs of an environment name."""


def next_log(folder: Path, policy: Policy, run: str) -> EpisodeLog:
    """The log of an episode that begins: `episode-NNNNN`, numbered after those in a folder.

    Args:
        folder: of the logs; made if it is not there.
        policy: decides.
        run: name of the run.

    Raises:
        RunFolderError: no folder can be made there.
    """
    numbers = [path.name.removeprefix("episode-") for path in folder.glob("episode-*")]
    number = 1 + max((int(each) for each in numbers if each.isdecimal()), default=-1)
    while True:  # another environment may write there too
        place = folder / f"episode-{number:05d}"
        try:
            place.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():
                raise _unusable(folder, error) from error
            number += 1
        except OSError as error:
            raise _unusable(folder, error) from error
        else:
            return EpisodeLog(DecisionLog(place).append, policy, run)


def _unusable(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"No log of an episode can be made in {folder} ({error.strerror or error}). Pass as logs a folder that can be "
        "written to, or the name of one that does not exist yet."
    )
