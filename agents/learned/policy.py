"""A trained policy: a network, the actor, and a value ensemble that chooses between its plan and other candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ...allocation.observation import Observation
from ...allocation.plan import project
from ...allocation.policy import Decision, decision_from_scores, decision_to_keep, is_first
from ...common.arrays import FloatArray
from .candidates import candidate_actions
from .gaussian import CorrelatedGaussian
from .network import RankNetwork
from .plan_value import Plans, PlanValueEnsemble

DRAWS = 48
"""Candidates beside the fixed ones. Every decision draws the same numbers, so that decisions can be reproduced."""

LCB_COEFFICIENT, LATER_LCB_COEFFICIENT = 1.0, 2.0
"""The lower confidence bound is the ensemble's mean less this number of standard deviations, at the first decision and
at later ones. Later ones are more cautious, because a change during a run costs something."""


@dataclass(frozen=True, eq=False)
class MeanAction:
    """The mean of the actor's distribution.

    Attributes:
        scores: (modules,).
        placement: see `PLACEMENT`, (2,).
        log_prob: log-probability density of the action.
        expected: expected improvement over the rule that the actor started from, in shares of the headroom.
        uncertainty: standard deviation of that over the actor's critics.
    """

    scores: FloatArray
    placement: FloatArray
    log_prob: float
    expected: float
    uncertainty: float


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Takes the candidate with the highest lower confidence bound; without a value ensemble, the actor's mean action.

    Candidates are compared with the ranks in place, at the first decision with uniform rank. If the bound of none is
    above 0, the ranks in place (or uniform rank) are the decision.

    Attributes:
        name: the name in logs and tables.
        network: the actor, on the CPU and in evaluation mode.
        value_ensemble: estimates the value of plans, in evaluation mode; None to take the actor's action.
        sha256: of the file of weights; None for a policy that was not loaded from a file.
    """

    name: str
    network: RankNetwork
    value_ensemble: PlanValueEnsemble | None = None
    sha256: str | None = None

    @torch.no_grad()
    def act(self, observation: Observation) -> MeanAction:
        """The actor's mean action."""
        count = len(observation.modules)
        mask = torch.ones(1, count)
        action = self.network(
            torch.from_numpy(observation.modules).unsqueeze(0), torch.from_numpy(observation.run).unsqueeze(0), mask
        )
        density = float(CorrelatedGaussian(action, mask).log_prob(action.mean))
        values = action.mean[0].double().numpy()
        expected, uncertainty = float(action.values.mean()), float(action.values.std(unbiased=False))
        return MeanAction(values[:count], values[count:], density, expected, uncertainty)

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation; the same observation always leads to the same decision."""
        action = self.act(observation)
        if self.value_ensemble is None:
            decision = decision_from_scores(observation, action.scores, action.placement, action.log_prob)
            return replace(decision, expected=action.expected, uncertainty=action.uncertainty)
        candidates = _candidates(observation, action)
        bound, expected, uncertainty = self._gains(observation, action, candidates)
        best = int(np.argmax(bound))
        return replace(candidates[best], expected=float(expected[best]), uncertainty=float(uncertainty[best]))

    @torch.no_grad()
    def _gains(
        self, observation: Observation, action: MeanAction, candidates: list[Decision]
    ) -> tuple[NDArray[np.float32], ...]:
        """The gain of each candidate over the first one: lower confidence bound, mean, standard deviation."""
        assert self.value_ensemble is not None
        problem = observation.problem
        ranks = np.stack([project(problem, decision.ranks, decision.scores).ranks for decision in candidates])
        plans = Plans(
            torch.from_numpy(observation.modules).unsqueeze(0),
            torch.from_numpy(action.scores - action.scores.mean()).float().unsqueeze(0),
            torch.from_numpy(observation.run).unsqueeze(0),
            torch.ones(1, len(observation.modules)),
            torch.from_numpy(ranks).unsqueeze(0),
        )
        values = self.value_ensemble(plans)[:, 0]
        gains = (values - values[:, :1]).numpy()
        mean, std = gains.mean(axis=0), gains.std(axis=0)
        lcb_coefficient = LCB_COEFFICIENT if is_first(observation) else LATER_LCB_COEFFICIENT
        return mean - lcb_coefficient * std, mean, std


def _candidates(observation: Observation, action: MeanAction) -> list[Decision]:
    """The decisions between which the value ensemble chooses; they are compared with the first one."""
    actions = candidate_actions(observation, action.scores, action.placement, DRAWS, np.random.default_rng(0))
    decisions = [
        decision_from_scores(observation, scores, placement) for scores, placement in zip(*actions, strict=True)
    ]
    return decisions if is_first(observation) else [decision_to_keep(observation), *decisions]
