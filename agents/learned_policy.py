"""A policy that PPO has trained: its network scores modules, and plans follow from scores as those of rules do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.arrays import FloatArray
from ..common.devices import without_autocast
from ..decide.observation import Observation
from ..decide.policy import Decision, decision_from_scores
from ..decide.settings import DecisionSchedule
from .networks import RankNetwork


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Takes the mean of the network's distribution of actions.

    Attributes:
        name: the name in logs and tables.
        network: on the CPU and in evaluation mode.
        sha256: of the file of weights; None for a policy that was not loaded from a file.
        schedule: when it was trained to decide; None where nothing tells.
        folder: from which it was loaded; None for one that was not.
    """

    name: str
    network: RankNetwork
    sha256: str | None = None
    schedule: DecisionSchedule | None = None
    folder: Path | None = None

    @torch.no_grad()
    def act(self, observation: Observation) -> tuple[FloatArray, FloatArray]:
        """The mean action: the score of each module, (modules,), and the placement, see `PLACEMENT`, (2,)."""
        parts = (torch.from_numpy(part).unsqueeze(0) for part in (observation.modules, observation.run))
        count = len(observation.modules)
        values = self.network(*parts, torch.ones(1, count)).mean[0].double().numpy()
        return values[:count], values[count:]

    @without_autocast()
    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation; the same observation always leads to the same decision."""
        return decision_from_scores(observation, *self.act(observation))
