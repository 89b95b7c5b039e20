"""A trained policy: a network, the actor, and a value ensemble that chooses between its plan and other candidates.

`LearnedPolicy` aims at the lowest loss; `with_goal` makes one that aims at a goal of cost, and `exploring` one that
draws its plans, so that its log can tell what other policies would have been worth.

Some candidates are fixed: those of the rules and the actor's. Others are drawn. Their scores are weighted sums of the
mean signal, the cost of a rank, the relative depth and the actor's scores. Weights and placements are drawn from wide
distributions, because nobody knows in advance how deep adapters should go, or how far signals can be trusted.

A policy whose networks tell plans of any cost apart weighs more plans at a first decision: plain LoRA, the fixed
candidates under lower limits, and plans that follow from the structure of the model alone, kinds of modules and parts
of its depth, at one rank or two. Which kinds a task needs, and how deep adapters must go, decides more on real models
than ranks do. Kinds are told apart by shapes (`ModuleShapes`): *wide* modules have the inner side of their layer, as an
MLP has; the others, those of attention, are *narrow*.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...common.arrays import BoolArray, FloatArray, IntArray
from ...common.devices import without_autocast
from ...cost.cost import ParameterCost, TimedCost, moment_costs, unit_cost, unit_costs
from ...errors import ConfigError
from ...lora.spec import REFERENCE_RANK
from ...plan.goal import CAUTION, Goal, broad_plans
from ...plan.plan import SCORE_BOUND, base_rank_floor, dearer, least_ranks, under_limit, uniform_ranks, uniform_window
from ...plan.problem import AllocationProblem
from ..observation import Float32Array, Observation, module_feature
from ..policy import (
    DRAWN,
    Decision,
    Deliberation,
    Policy,
    Votes,
    decided_plan,
    decision_from_plan,
    decision_from_scores,
    decision_to_keep,
    is_first,
)
from ..rules import signal_mean
from .networks import Plans, PlanValueConfig, PlanValueEnsemble, RankNetwork

RANKS = (2, REFERENCE_RANK, 16)
"""Ranks of adapted modules; on real models, higher ones gained nothing."""

THIN = 2
"""The rank of the remaining modules in a mixture."""

KINDS = ("narrow", "wide")
DEPTHS = ("every other layer", "top quarter", "top half", "top three quarters")

ALL_LINEAR = "all-linear"
"""Name of plain LoRA as a candidate: rank 8 on every target module."""


def all_linear(problem: AllocationProblem) -> IntArray:
    """Plain LoRA, rank 8 on every target module or its highest, int64 (modules,); bounds and limit play no part."""
    return np.minimum(REFERENCE_RANK, problem.max_ranks)


def parts(observation: Observation) -> dict[str, BoolArray]:
    """The modules of each part of a model, bool (modules,), by name; parts that are empty or all of it are left out."""
    problem = observation.problem
    wide = module_feature(observation, "wide") > 0.5
    layers, turn = np.unique(problem.blocks, return_inverse=True)
    count = len(layers)
    found = {
        "all": np.ones(len(wide), dtype=np.bool_),
        "narrow": ~wide,
        "wide": wide,
        "every other layer": (count - 1 - turn) % 2 == 0,
        "top quarter": turn >= count - -(-count // 4),
        "top half": turn >= count - -(-count // 2),
        "top three quarters": turn >= count - -(-3 * count // 4),
    }
    for kind in KINDS:
        found[f"{kind} in the top half"] = found[kind] & found["top half"]
    return {name: part for name, part in found.items() if part.any() and (name == "all" or not part.all())}


def structure_plans(observation: Observation) -> Iterator[tuple[str, IntArray]]:
    """Plans by name: ranks on the ladder within the bounds, int64 (modules,); the limit plays no part.

    Args:
        observation: of a first decision.
    """
    problem = observation.problem
    found = parts(observation)
    for name, part in found.items():
        for rank in (1, *RANKS) if name == "all" else RANKS:
            yield f"{name} at {rank}", _plan(problem, part, rank, 0)
    for name in (*KINDS, "top half"):
        for rank in RANKS[1:]:
            if name in found:
                yield f"{name} at {rank}, others at {THIN}", _plan(problem, found[name], rank, THIN)


def _plan(problem: AllocationProblem, part: BoolArray, rank: int, others: int) -> IntArray:
    wanted = problem.ladder.rung(np.minimum(np.where(part, rank, others), problem.max_ranks))
    return problem.ladder.array[np.clip(wanted, problem.bottoms, problem.tops)]


BASIS = ("signal_mean", "rank_cost", "relative_depth", "actor")
"""The scores of candidates are weighted sums of these."""

_FIXED = {
    "uniform": (0, 0, 0, 0),
    "top-down": (0, 0, 0, 0),
    "signal-mean": (0.5, 0, 0, 0),
    "top-down-mlp": (0, 1, 0, 0),
    "actor": (0, 0, 0, 1),
}
"""Weights of the fixed candidates, by name."""

FIXED_NAMES = tuple(_FIXED)
"""Names of the fixed candidates; they come first."""

FIXED = len(_FIXED)
"""Number of fixed candidates."""

UNIFORM = FIXED_NAMES[0]
"""Name of the candidate with equal ranks."""

KEEP = "keep"
"""Name of the candidate that leaves the ranks as they are."""

SHARES = (0.2, 0.4, 0.6, 0.8)
"""Lower limits of the fixed candidates; see `with_less`."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One candidate at a decision.

    Attributes:
        name: what the log calls it.
        scores: of the modules, (modules,).
        weights: of each part of `BASIS` in the scores, (len(BASIS),).
        placement: see `PLACEMENT`, (2,).
        ranks: the plan, int64 (modules,), of a candidate that follows from no scores under this budget; else None.
    """

    name: str
    scores: FloatArray
    weights: FloatArray = field(default_factory=lambda: np.zeros(len(BASIS)))
    placement: FloatArray = field(default_factory=lambda: np.zeros(2))
    ranks: IntArray | None = None

    def decision(self, observation: Observation) -> Decision:
        """The decision that it leads to."""
        if self.name == KEEP:
            return decision_to_keep(observation)
        if self.ranks is not None:
            return Decision(self.ranks, self.scores, exact=True)
        return decision_from_scores(observation, self.scores, self.placement)


def with_uniform_plan(candidates: Sequence[Candidate], problem: AllocationProblem) -> list[Candidate]:
    """The same, with the very plan of the rule for the candidate `UNIFORM`, whose scores come near to it alone."""
    ranks = decided_plan(problem, decision_from_plan(uniform_ranks(problem))).ranks
    return [replace(each, ranks=ranks) if each.name == UNIFORM else each for each in candidates]


def candidate_actions(
    observation: Observation, scores: FloatArray, placement: FloatArray, draws: int, generator: np.random.Generator
) -> list[Candidate]:
    """The candidates at a decision that spend the budget: the fixed ones, then those that are drawn.

    Args:
        observation: of the decision.
        scores: the actor's, (modules,).
        placement: the actor's, (2,).
        draws: number of candidates that are drawn, beside the fixed ones.
        generator: draws them.
    """
    problem = observation.problem
    by_parameters = isinstance(problem.cost, ParameterCost)
    parts = (signal_mean(observation), *(module_feature(observation, name) for name in BASIS[1:3]), scores)
    basis = np.stack([part - part.mean() for part in parts])
    rank, _ = uniform_window(problem.fresh()) or (1, 0)
    uniform = (np.log2(rank / base_rank_floor(problem)), 0)
    fixed = np.array([uniform, (0, 0), (0, 0), (0, 0), tuple(placement)], dtype=np.float64)
    drawn = _short(_draw_weights(draws, generator))
    weights = np.concatenate([np.array([*_FIXED.values()], dtype=np.float64), drawn])
    placements = np.concatenate([fixed, _short(_draw_placements(draws, by_parameters, generator))])
    names = (*_FIXED, *(f"{DRAWN}{number}" for number in range(draws)))
    all_scores = np.clip(weights @ basis, -SCORE_BOUND, SCORE_BOUND)
    placements = np.clip(placements, -SCORE_BOUND, SCORE_BOUND)
    return [Candidate(*each) for each in zip(names, all_scores, weights, placements, strict=True)]


def all_options(observation: Observation, candidates: Sequence[Candidate], *, plain_first: bool) -> list[Candidate]:
    """Candidates of a first decision, with plans of any cost beside them.

    After the fixed ones come plain LoRA, plans that follow from the model's structure, as far as they fit, and the
    fixed candidates under lower limits of the budget and, where it is known, of the time of a step. Those that were
    drawn are the last.

    Args:
        observation: of the first decision.
        candidates: from `candidate_actions`.
        plain_first: put plain LoRA before all others, which are then compared with it.
    """
    problem, nothing = observation.problem, np.zeros(len(observation.modules))
    fixed, drawn = candidates[:FIXED], candidates[FIXED:]
    plain, exact = Candidate(ALL_LINEAR, nothing, ranks=all_linear(problem)), with_uniform_plan(fixed, problem)
    structure = [
        Candidate(name, nothing, ranks=ranks)
        for name, ranks in structure_plans(observation)
        if ranks.any() and problem.fits(ranks)
    ]
    limits = [(f"{share:.0%} of the budget", with_less(problem, share)) for share in SHARES]
    if isinstance(problem.cost, TimedCost):
        limits += [(f"{share:.0%} of the time", with_less_time(problem, share)) for share in SHARES]
    for_less = []
    for of_what, limited in limits:
        less = replace(observation, problem=limited)
        for each in with_uniform_plan(fixed, limited):
            ranks = decided_plan(limited, each.decision(less)).ranks
            for_less.append(replace(each, name=f"{each.name} for {of_what}", ranks=ranks))
    first = [plain, *exact] if plain_first else [*exact, plain]
    return [*first, *structure, *for_less, *drawn]


def can_take(problem: AllocationProblem, ranks: IntArray) -> bool:
    """Whether a plan fits and keeps the ladder and the bounds; ranks int64 (modules,)."""
    rungs = problem.ladder.rung(ranks)
    on_ladder = (problem.ladder.array[rungs] == ranks).all() and (rungs >= problem.bottoms).all()
    return bool(on_ladder and (rungs <= problem.tops).all() and problem.fits(ranks))


def with_less(problem: AllocationProblem, share: float) -> AllocationProblem:
    """The problem with a lower limit, in its own unit; a limit of the time of a step stays as it is.

    Args:
        problem: of a first decision.
        share: where the limit lies between the cheapest plan (0) and plain LoRA or the limit itself (1), whichever is
            lower.
    """
    least = unit_cost(problem.cost, least_ranks(problem))
    most = min(problem.limit, unit_cost(problem.cost, all_linear(problem)))
    return under_limit(problem, least + share * max(0.0, most - least))


def with_less_time(problem: AllocationProblem, share: float) -> AllocationProblem:
    """The problem with a lower limit of the time of a step; see `with_less`.

    Args:
        problem: with the time of a step among its costs.
        share: see `with_less`.
    """
    assert isinstance(problem.cost, TimedCost)
    least, plain = (
        float(moment_costs(problem.cost, ranks)[-1]) for ranks in (least_ranks(problem), all_linear(problem))
    )
    most = min(problem.limit, plain)
    return dearer(problem, problem.limit / (least + share * max(0.0, most - least)))


def _short(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values rounded to half precision, as those were with which the shipped policies were trained."""
    return values.astype(np.float16).astype(np.float64)


def _draw_weights(draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Weights, (draws, len(BASIS))."""
    return np.stack(
        [
            generator.choice([0.0, 0.5, 1.0], draws),
            generator.normal(0, 0.4, draws),
            generator.normal(0, 0.6, draws),
            generator.choice([0.0, 1.0, 2.0], draws),
        ],
        axis=1,
    )


def _draw_placements(draws: int, by_parameters: bool, generator: np.random.Generator) -> NDArray[np.float64]:
    """Placements, (draws, 2). Under a budget of parameters, only a rank floor above 1 leaves modules out."""
    if by_parameters:
        depth_biases = generator.choice([0.0, 1.0], draws) * generator.normal(0, 1, draws)
        return np.stack([generator.uniform(-0.5, 3.0, draws), depth_biases], axis=1)
    return np.stack([generator.uniform(-4.0, 2.0, draws), generator.uniform(-4.0, 1.0, draws)], axis=1)


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
