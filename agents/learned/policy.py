"""A trained policy: a network, the actor, and a value ensemble that chooses between its plan and other candidates.

A learned policy that draws its plans, so that its log can tell what other policies would have been worth.

A learned policy that aims at another goal than the lowest loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...common.arrays import FloatArray, IntArray
from ...common.devices import without_autocast
from ...cost.cost import TimedCost, moment_costs, unit_costs
from ...errors import ConfigError
from ...plan.goal import CAUTION, Goal, broad_plans
from ...plan.problem import AllocationProblem
from ..deliberation import Deliberation, Votes
from ..observation import Float32Array, Observation
from ..policy import Decision, Policy, decided_plan, decision_from_scores, is_first
from .candidates import ALL_LINEAR, KEEP, UNIFORM, Candidate, all_options, can_take, candidate_actions
from .network import RankNetwork
from .plan_value import Plans, PlanValueConfig, PlanValueEnsemble

DRAWS = 24
"""Candidates beside the fixed ones. Every decision draws the same numbers, so that decisions can be reproduced."""

LCB_COEFFICIENT, LATER_LCB_COEFFICIENT = 1.0, 2.0
"""The lower confidence bound is the ensemble's mean less this number of standard deviations, at the first decision and
at later ones. Later ones are more cautious, because a change during a run costs something."""

TIE = 0.05
"""Plans whose lower bounds differ by less, in standard deviations of the log loss between plans, are tied."""

NEW_RANK = 1
"""The rank of new adapters at the first decision; trained ones have those of an earlier run."""

LOSS_TIE = 0.1
"""The same in votes on the log loss: near plain LoRA 0.1 % of the loss."""


@dataclass(frozen=True, eq=False)
class MeanAction:
    """The mean of the actor's distribution.

    Attributes:
        scores: (modules,).
        placement: see `PLACEMENT`, (2,).
        gains: of each direction in the scores, (len(DIRECTIONS),).
        estimate: of what each module is worth, (modules,).
        expected: expected improvement over the rule that the actor started from, in shares of the headroom.
        uncertainty: standard deviation of that over the actor's critics.
    """

    scores: FloatArray
    placement: FloatArray
    gains: FloatArray
    estimate: FloatArray
    expected: float
    uncertainty: float


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Takes the candidate with the highest lower confidence bound; without a value ensemble, the actor's mean action.

    Candidates are compared with the ranks in place, at the first decision with uniform rank. If the bound of none is
    above 0, the ranks in place (or uniform rank) are the decision. Of plans that are tied, the one nearest to those
    ranks is taken.

    Under a goal of cost, candidates are compared with plain LoRA, rank 8 on every target module. The cheapest one whose
    bound is within the tolerance is taken; of those that cost the same, the one nearest to uniform rank, which is also
    the decision if none is within the tolerance. Later decisions then keep the ranks.

    Attributes:
        name: the name in logs and tables.
        network: the actor, on the CPU and in evaluation mode.
        value_ensemble: estimates the value of plans, in evaluation mode; None to take the actor's action.
        sha256: of the file of weights; None for a policy that was not loaded from a file.
        temperature: draw the plan from a softmax over the bounds divided by this, in their unit; 0 to take the best.
        seed: with the observation it decides what is drawn.
        goal: what it aims at; a goal of cost needs an ensemble that votes on the log loss, see `with_goal`.
    """

    name: str
    network: RankNetwork
    value_ensemble: PlanValueEnsemble | None = None
    sha256: str | None = None
    temperature: float = 0.0
    seed: int = 0
    goal: Goal = Goal()  # noqa: RUF009  (it is frozen)

    @torch.no_grad()
    def act(self, observation: Observation) -> MeanAction:
        """The actor's mean action."""
        count = len(observation.modules)
        action = self._action(observation.modules, observation.run)
        values = action.mean[0].double().numpy()
        gains, estimate = (part[0].double().numpy() for part in (action.gains, action.estimate))
        expected, uncertainty = float(action.values.mean()), float(action.values.std(unbiased=False))
        return MeanAction(values[:count], values[count:], gains, estimate, expected, uncertainty)

    @torch.no_grad()
    def scores_of(self, modules: Float32Array, run: Float32Array) -> FloatArray:
        """The scores of the mean action alone, (modules,), on the features of an observation."""
        return np.asarray(self._action(modules, run).mean[0, : len(modules)].double().numpy())

    def _action(self, modules: Float32Array, run: Float32Array) -> Any:
        parts = (torch.from_numpy(part).unsqueeze(0) for part in (modules, run))
        return self.network(*parts, torch.ones(1, len(modules)))

    @without_autocast()
    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation; the same observation always leads to the same decision.

        Raises:
            ConfigError: the costs of plans do not know what the goal asks for.
        """
        action = self.act(observation)
        if self.value_ensemble is None:
            decision = decision_from_scores(observation, action.scores, action.placement)
            return replace(decision, expected=action.expected, uncertainty=action.uncertainty)
        cost = observation.problem.cost
        if self.goal.kind == "time" and is_first(observation) and not isinstance(cost, TimedCost):
            raise ConfigError("goal='time' needs the time of a step, and here the time of a step is not known.")
        if self.goal.kind == "bytes" and cost.unit != "bytes":
            raise ConfigError(f"goal='bytes' needs a budget of bytes, and this one counts {cost.unit}.")
        candidates = self._candidates(observation, action, self.value_ensemble.config)
        decisions = [candidate.decision(observation) for candidate in candidates]
        found = self._weigh(observation, action, candidates, decisions, self.value_ensemble)
        return replace(
            decisions[found.taken],
            log_prob=float(np.log(found.probabilities[found.plan])) if self.temperature else None,
            expected=float(found.mean[found.plan]),
            uncertainty=float(found.std[found.plan]),
            deliberation=found,
        )

    def _candidates(self, observation: Observation, action: MeanAction, values: PlanValueConfig) -> list[Candidate]:
        """The candidates between which the value ensemble chooses; they are compared with the first one."""
        usual = candidate_actions(observation, action.scores, action.placement, DRAWS, np.random.default_rng(0))
        if not is_first(observation):
            keep = Candidate(KEEP, np.zeros(len(observation.modules)))
            return [keep] if self.goal.saves else [keep, *usual]
        if values.unit == "spread":
            return usual
        return all_options(observation, usual, plain_first=self.goal.saves)

    def _weigh(
        self,
        observation: Observation,
        action: MeanAction,
        candidates: Sequence[Candidate],
        decisions: Sequence[Decision],
        ensemble: PlanValueEnsemble,
    ) -> Deliberation:
        """Vote on the plans of all candidates, beside that of the first one, and choose."""
        problem, first, values = observation.problem, is_first(observation), ensemble.config
        ranks = np.stack(
            [  # plain LoRA is compared with even if it does not fit
                decision.ranks if candidate.name == ALL_LINEAR else decided_plan(problem, decision).ranks
                for candidate, decision in zip(candidates, decisions, strict=True)
            ]
        )
        places, plan_of = _distinct(ranks)
        caution = CAUTION if self.goal.saves else LCB_COEFFICIENT
        run = observation.run.tolist()
        found = Deliberation(
            candidates=tuple(candidate.name for candidate in candidates),
            weights=np.stack([candidate.weights for candidate in candidates]),
            placements=np.stack([candidate.placement for candidate in candidates]),
            plan_of=plan_of,
            plans=ranks[places],
            votes=_votes(ensemble, observation, action.scores, ranks)[:, places],
            lcb_coefficient=caution if first else LATER_LCB_COEFFICIENT,
            tie=TIE if values.unit == "spread" else LOSS_TIE,
            actor_gains=action.gains,
            actor_estimate=action.estimate,
            actor_scores=action.scores,
            temperature=self.temperature,
            seed=self.seed,
            unit=values.unit,
            doubt=values.doubt_of(run),
            outside=values.outside(run),
            trained=first and bool((problem.ranks > NEW_RANK).any()),
            goal=self.goal,
        )
        if first and values.unit == "log loss":
            found = _with_costs(found, problem)
        plan = found.favourite
        if self.temperature:
            digest = hashlib.sha256(observation.run.tobytes() + observation.modules.tobytes()).digest()
            generator = np.random.default_rng([self.seed, *digest])
            plan = int(generator.choice(len(found.plans), p=found.probabilities))
        return replace(found, taken=int(places[plan]))


@torch.no_grad()
def _votes(ensemble: PlanValueEnsemble, observation: Observation, scores: FloatArray, ranks: IntArray) -> Votes:
    """What each network expects of each plan, less what it expects of the first one, (networks, plans)."""
    plans = Plans(
        torch.from_numpy(observation.modules).unsqueeze(0),
        torch.from_numpy(scores - scores.mean()).float().unsqueeze(0),
        torch.from_numpy(observation.run).unsqueeze(0),
        torch.ones(1, len(observation.modules)),
        torch.from_numpy(ranks).unsqueeze(0),
    )
    values = ensemble(plans)[:, 0]
    votes: Votes = (values - values[:, :1]).numpy()
    return votes


def _with_costs(found: Deliberation, problem: AllocationProblem) -> Deliberation:
    """The same with what its plans cost, which of them can be taken, and which are plain LoRA and uniform rank."""
    cost, plans = problem.cost, found.plans
    return replace(
        found,
        simple=int(found.plan_of[found.candidates.index(UNIFORM)]),
        plain=int(found.plan_of[found.candidates.index(ALL_LINEAR)]),
        costs=unit_costs(cost, plans).max(axis=1),
        seconds=moment_costs(cost, plans)[:, -1] / cost.unit_per_second if isinstance(cost, TimedCost) else None,
        allowed=np.array([can_take(problem, ranks) for ranks in plans]),
        broad=broad_plans(problem, plans),
    )


def _distinct(ranks: IntArray) -> tuple[IntArray, IntArray]:
    """The distinct plans among some, (plans, modules): of each the first one's place, and of each plan which it is."""
    _, places, which = np.unique(ranks, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(places)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return places[order], number[which.reshape(-1)]


def exploring(policy: Policy, temperature: float | str, seed: int = 0) -> LearnedPolicy:
    """The policy, drawing from a softmax over the lower bounds of its plans.

    At .05 the plan that the policy prefers is drawn a third of the time, and a draw costs .025 in the unit of the
    bounds; at .1 it costs .064 (docs/experiments.md).

    Args:
        policy: a learned policy with a value ensemble.
        temperature: see `LearnedPolicy`, > 0.
        seed: with the observation it decides what is drawn.

    Raises:
        ConfigError: the temperature is no number above 0, or the policy has no value ensemble.
    """
    try:
        value = float(temperature)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"Exploration takes a temperature above 0, in the unit of the votes, such as 0.05; got {temperature!r}."
        )
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        raise ConfigError(f"{policy.name} has no value ensemble, so there is nothing to draw plans by.")
    return replace(policy, name=f"{policy.name} exploring at {value:g}", temperature=value, seed=seed)


def drawing_from(policy: Policy, seed: int) -> Policy:
    """A policy that explores with another seed of what it draws; any other policy as it is.

    Args:
        policy: any.
        seed: see `exploring`.
    """
    return replace(policy, seed=seed) if isinstance(policy, LearnedPolicy) and policy.temperature else policy


def with_goal(policy: Policy, goal: Goal) -> Policy:
    """The policy, aiming at a goal.

    Raises:
        ConfigError: the goal asks for a cheap plan, and the policy is a rule, has no networks that tell plans of any
            cost apart, or draws its plans.
    """
    if not goal.saves:
        return policy
    check_any_cost(policy, f"goal={goal.kind!r}", "use goal='quality'")
    assert isinstance(policy, LearnedPolicy)
    if policy.temperature:
        raise ConfigError(f"{policy.name} draws its plans, which goal={goal.kind!r} cannot: leave `explore` out.")
    return replace(policy, goal=goal)


def check_any_cost(policy: Policy, what: str, instead: str) -> None:
    """Refuse a policy that cannot tell what a cheaper plan would lose.

    Args:
        policy: decides.
        what: needs that, for the error.
        instead: what else can be done.

    Raises:
        ConfigError: the policy is a rule, or its networks do not tell plans of any cost apart.
    """
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        raise ConfigError(
            f"{policy.name} expects nothing of plans, so {what} needs another policy: one with value networks, made by "
            f"`rankpilot train`. Or {instead}."
        )
    if policy.value_ensemble.config.unit != "log loss":
        raise ConfigError(
            f"The networks of {policy.name} compare plans of one cost alone, so {what} needs a policy that was trained "
            f"with plans of any cost (`rankpilot train`). Or {instead}."
        )
