"""A trained network behind the policy contract: an actor, and critics that choose between its plan and others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ...allocation.observation import Observation
from ...allocation.plan import project
from ...allocation.policy import Decision, decision_from_scores, decision_to_keep, is_first
from ...common.arrays import FloatArray
from .candidates import propose
from .gaussian import CorrelatedGaussian
from .network import RankNetwork
from .plan_value import Plans, PlanValueEnsemble

DRAWS = 48
"""Proposals beside the fixed ones; the same draws at every decision, so that decisions are reproducible."""

LCB_COEFFICIENT, LATER_LCB_COEFFICIENT = 1.0, 2.0
"""Standard deviations among the critics that are taken off what they expect of a plan, at the first decision and at
later ones: a change in mid-run has to be surer."""


@dataclass(frozen=True, eq=False)
class MeanAction:
    """What the actor wants.

    Attributes:
        scores: (modules,).
        placement: corrections of floor and depth bias, (2,).
        log_prob: log-probability density of the action.
        expected: improvement over the rule that it started from, in shares of the headroom.
        uncertainty: standard deviation of that among its critics.
    """

    scores: FloatArray
    placement: FloatArray
    log_prob: float
    expected: float
    uncertainty: float


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Decides by the actor's mean action; with plan critics, by the plan of which they expect the most.

    The critics compare proposals (`propose`) with the ranks as they are, at the first decision with uniform rank. What
    they agree on counts; without any such plan nothing changes.

    Attributes:
        name: what logs and tables call it.
        network: the actor; on the CPU, in evaluation mode.
        critics: judge plans, in evaluation mode; None for the actor alone.
        sha256: of the file of weights that it was loaded from; None if it was not.
    """

    name: str
    network: RankNetwork
    critics: PlanValueEnsemble | None = None
    sha256: str | None = None

    @torch.no_grad()
    def act(self, observation: Observation) -> MeanAction:
        """The actor's mean action; deterministic."""
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
        """Decide on one observation; deterministic."""
        action = self.act(observation)
        if self.critics is None:
            decision = decision_from_scores(observation, action.scores, action.placement, action.log_prob)
            return replace(decision, expected=action.expected, uncertainty=action.uncertainty)
        decisions = _proposals(observation, action)
        lower, expected, uncertainty = self._judge(observation, action, decisions)
        best = int(np.argmax(lower))
        return replace(decisions[best], expected=float(expected[best]), uncertainty=float(uncertainty[best]))

    @torch.no_grad()
    def _judge(
        self, observation: Observation, action: MeanAction, decisions: list[Decision]
    ) -> tuple[NDArray[np.float32], ...]:
        """What decisions gain over the first: lower bound, mean and standard deviation among critics, (decisions,)."""
        assert self.critics is not None
        problem = observation.problem
        ranks = np.stack([project(problem, decision.ranks, decision.scores).ranks for decision in decisions])
        plans = Plans(
            torch.from_numpy(observation.modules).unsqueeze(0),
            torch.from_numpy(action.scores - action.scores.mean()).float().unsqueeze(0),
            torch.from_numpy(observation.run).unsqueeze(0),
            torch.ones(1, len(observation.modules)),
            torch.from_numpy(ranks).unsqueeze(0),
        )
        judged = self.critics(plans)[:, 0]
        gains = (judged - judged[:, :1]).numpy()
        mean, std = gains.mean(axis=0), gains.std(axis=0)
        caution = LCB_COEFFICIENT if is_first(observation) else LATER_LCB_COEFFICIENT
        return mean - caution * std, mean, std


def _proposals(observation: Observation, action: MeanAction) -> list[Decision]:
    """Decisions to choose from; the one that they are compared with comes first."""
    actions = propose(observation, action.scores, action.placement, DRAWS, np.random.default_rng(0))
    decisions = [
        decision_from_scores(observation, scores, placement) for scores, placement in zip(*actions, strict=True)
    ]
    return decisions if is_first(observation) else [decision_to_keep(observation), *decisions]
