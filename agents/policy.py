"""What every policy is, hand-written or learned, and what a learned one computes at a decision.

A policy decides on an observation. A learned one weighs candidates, the plans that they lead to, and votes on these.
Its choice, the decision log and every explanation read one `Deliberation`, so they cannot disagree. The log stores its
fields; `decision_line` and the study page put it into words.

The frontier has the plans that are worth their cost: no other plan costs less and is expected to lose as little. Losses
are relative to plain LoRA, rank 8 on every target module, of the same data and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.text import part_of, plural
from ..errors import ConfigError, shown
from ..plan.goal import CAUTION, TOLERANCE, Goal, improvement_of
from ..plan.plan import Plan, base_depth_bias, base_rank_floor, pack, project
from ..plan.problem import AllocationProblem
from .observation import Observation, run_feature_number, run_feature_text

Votes = NDArray[np.float32]

Outside = tuple[float, float, float]
"""A value, and the lowest and highest one that are known."""

VoteUnit = Literal["spread", "log loss"]
"""What networks vote in: standard deviations of the log loss between plans that cost the same, or see `goal`."""

COST_TIE = 0.01
"""Plans whose costs differ by less, as a share, are tied under a goal of cost."""

DRAWN = "drawn "
"""How names of candidates begin that were drawn; their numbers follow, from 0 on. They come last."""


@dataclass(frozen=True, eq=False)
class Deliberation:
    """One deliberation; C candidates, P distinct plans, N value networks, L modules.

    Attributes:
        candidates: names of the candidates, (C,): "keep", rules, "actor", and numbers of those that were drawn.
        weights: of each part of `BASIS` in the scores of each candidate, (C, len(BASIS)); all 0 for "keep".
        placements: of each candidate, see `PLACEMENT`, (C, 2).
        plan_of: the plan to which each candidate leads, int64 (C,). The first candidate's is the reference: uniform
            rank, or at later decisions the ranks in place; under a goal of cost plain LoRA, even if it does not fit.
        plans: ranks, int64 (P, L), all different, in the order in which candidates lead to them.
        votes: how much better than the reference each network expects each plan to be, in `unit`, float32 (N, P).
        lcb_coefficient: the lower bound is the mean vote less so many standard deviations.
        tie: plans whose lower bound is less than this below the best one's are tied with it, in the unit of votes.
        actor_gains: of each of the actor's `DIRECTIONS` in its scores, float64 (len(DIRECTIONS),).
        actor_estimate: the actor's estimate of what each module is worth, float64 (L,).
        actor_scores: the actor's scores, (L,).
        temperature: of the softmax over lower bounds that plans are drawn from; 0 where the best is taken.
        seed: with what was seen it decided what was drawn.
        taken: the candidate that is the decision.
        unit: of the votes.
        goal: of the policy.
        doubt: what a goal of cost takes off votes on plans other than the reference, beside the spread; at least 0.
        outside: features of the run that lie outside of what the networks have learned from: the value, and the lowest
            and highest one there.
        trained: whether adapters keep what they have learned in an earlier run. The networks have learned from runs
            with new adapters alone.
        simple: the plan that others are preferred to only for a reason; None for the reference.
        plain: the plan that is plain LoRA; None if it is none of them.
        costs: of each plan, in the unit of the budget, (P,); None where plans cost the same.
        seconds: of a step under each plan, (P,); None where they are unknown.
        allowed: which plans can be taken, bool (P,); None for all.
        broad: which plans a goal of cost may take, see `broad_plans`, bool (P,); None for all.
    """

    candidates: tuple[str, ...]
    weights: FloatArray
    placements: FloatArray
    plan_of: IntArray
    plans: IntArray
    votes: Votes
    lcb_coefficient: float
    tie: float
    actor_gains: FloatArray
    actor_estimate: FloatArray
    actor_scores: FloatArray
    temperature: float = 0.0
    seed: int = 0
    taken: int = -1
    unit: VoteUnit = "spread"
    goal: Goal = Goal()  # noqa: RUF009  (it is frozen)
    doubt: float = 0.0
    outside: Mapping[str, Outside] = field(default_factory=dict)
    trained: bool = False
    simple: int | None = None
    plain: int | None = None
    costs: FloatArray | None = None
    seconds: FloatArray | None = None
    allowed: BoolArray | None = None
    broad: BoolArray | None = None

    @property
    def reference(self) -> int:
        """The plan that all others are compared with."""
        return int(self.plan_of[0])

    @property
    def plan(self) -> int:
        """The plan of the candidate that is taken."""
        return int(self.plan_of[self.taken])

    @cached_property
    def distances(self) -> FloatArray:
        """From each plan to the simple one, see `plan_distance`, (P,)."""
        return plan_distance(self.plans, self.plans[self.reference if self.simple is None else self.simple])

    @property
    def may_take(self) -> BoolArray:
        """Which plans can be taken, bool (P,)."""
        return np.ones(len(self.plans), dtype=np.bool_) if self.allowed is None else self.allowed

    @cached_property
    def mean(self) -> Votes:
        """The mean vote on each plan, (P,)."""
        return np.asarray(self.votes.mean(axis=0))

    @cached_property
    def std(self) -> Votes:
        """The standard deviation of the votes on each plan, (P,)."""
        return np.asarray(self.votes.std(axis=0))

    @cached_property
    def bound(self) -> Votes:
        """The lower confidence bound of each plan's improvement over the reference, (P,); this is maximised."""
        return np.asarray(self.mean - self.lcb_coefficient * self.std)

    @cached_property
    def tied(self) -> BoolArray:
        """The plans that cannot be told from the best one, bool (P,).

        The reference is the best only if no bound is above its own, which is 0; then it is alone. Else it is not among
        them, nor is any plan whose bound is not above 0: what may be worse than the reference is not taken for being
        near to it.

        Under a goal of cost these are the cheapest of the plans that are surely within the tolerance; if none is, the
        simple plan alone. At later decisions there is one plan, the ranks in place.
        """
        if self.misses_goal:
            return np.asarray(np.arange(len(self.plans)) == self.simple)
        if self.goal.saves and self.costs is not None:
            costs = self.seconds if self.goal.kind == "time" and self.seconds is not None else self.costs
            least = costs[self.within_tolerance].min()
            return np.asarray(self.within_tolerance & (costs <= (1 + COST_TIE) * least))
        bound = np.where(self.may_take, self.bound, -np.inf)
        best = int(np.argmax(bound))
        if best == self.reference:
            return np.asarray(np.arange(len(bound)) == best)
        return np.asarray((bound >= bound[best] - self.tie) & (bound > bound[self.reference]))

    @cached_property
    def reach(self) -> FloatArray:
        """How far the truth may lie from the mean vote on each plan under a goal of cost, (P,); 0 for the reference."""
        others = np.arange(len(self.plans)) != self.reference
        return np.asarray(self.lcb_coefficient * self.std + self.doubt * others)

    @cached_property
    def within_tolerance(self) -> BoolArray:
        """The plans that can be taken, are broad, and lose surely no more than the goal tolerates, bool (P,)."""
        return np.asarray(self.may_take & ~self.narrow & (self.mean - self.reach >= self.goal.least_vote))

    @property
    def narrow(self) -> BoolArray:
        """The plans below the floor, where plain LoRA can be taken in their place, bool (P,); else none."""
        if self.broad is None or self.plain is None or not self.may_take[self.plain]:
            return np.zeros(len(self.plans), dtype=np.bool_)
        return ~self.broad

    @property
    def misses_goal(self) -> bool:
        """Whether a goal of cost cannot be kept: no plan that can be taken is surely within the tolerance."""
        return self.goal.saves and self.costs is not None and not self.within_tolerance.any()

    @property
    def loss_beside_plain(self) -> float | None:
        """The log loss that is expected of the plan, less that of plain LoRA; None where it is unknown."""
        if self.costs is None or self.plain is None:
            return None
        return 0.0 - improvement_of(float(self.mean[self.plan] - self.mean[self.plain]))

    @cached_property
    def favourite(self) -> int:
        """The plan that is taken if none is drawn, of those that are tied the nearest to the simple one."""
        distances = np.where(self.tied, self.distances, np.inf)
        nearest = np.flatnonzero(distances == distances.min())
        return int(nearest[np.argmax(self.bound[nearest])])

    @cached_property
    def probabilities(self) -> FloatArray:
        """The probability that each plan is taken, (P,)."""
        if not self.temperature:
            return np.asarray(np.arange(len(self.plans)) == self.favourite, dtype=np.float64)
        logits = np.where(self.may_take, self.bound.astype(np.float64) / self.temperature, -np.inf)
        odds = np.exp(logits - logits.max())
        return np.asarray(odds / odds.sum())

    @property
    def margin(self) -> float:
        """How much higher the plan's lower bound is than that of the best other one that fits; 0 where none does."""
        others = self.bound[self.may_take & (np.arange(len(self.plans)) != self.plan)]
        return float(self.bound[self.plan] - others.max()) if len(others) else 0.0


def plan_distance(ranks: IntArray, reference: IntArray) -> FloatArray:
    """How far plans are from a reference: the mean of abs(log2(1 + rank) - log2(1 + reference)) over the modules.

    Args:
        ranks: (..., modules).
        reference: (modules,).

    Returns:
        Distances, (...).
    """
    return np.asarray(np.abs(np.log2(1.0 + ranks) - np.log2(1.0 + reference)).mean(axis=-1))


PLAIN = "rank 8 on all modules"
"""Plain LoRA, with which plans are compared, in words."""


def decision_line(step: int, before: IntArray, after: IntArray, cost: float, limit: float, unit: str) -> str:
    """A decision in one line: "step 28: 9 modules moved, 12.1 of 12.3 GiB, mean rank 9.4".

    Args:
        step: optimiser steps done before the decision.
        before: ranks before it, int (modules,).
        after: ranks of the plan, int (modules,). Their mean counts modules without an adapter as rank 0.
        cost: predicted cost of the plan.
        limit: the budget.
        unit: of both: "bytes" or "parameters".
    """
    count = int(np.count_nonzero(np.asarray(before) != np.asarray(after)))
    moved = f"{plural(count, 'module')} moved" if count else "no module moved"
    return f"step {step}: {moved}, {part_of(cost, limit, unit)}, mean rank {np.mean(after):.1f}"


def unlike(found: Deliberation) -> str:
    """In what a run is unlike those that the networks have learned from; empty where it is not."""
    features = (
        run_feature_text(name, value) + f" (not {run_feature_number(name, low)} to {run_feature_number(name, high)})"
        for name, (value, low, high) in found.outside.items()
    )
    return ", ".join([*(["adapters that are trained already"] if found.trained else []), *features])


def promise(found: Deliberation) -> str:
    """What is expected of the plan that is taken beside plain LoRA; empty where nothing is known."""
    loss = found.loss_beside_plain
    if loss is None or found.plain is None:
        return ""
    allowed = f"{found.goal.tolerance:.2g} (log)"
    if not found.goal.saves:
        fits = "" if found.may_take[found.plain] else ", which does not fit"
        known = found.plan != found.plain and not found.trained
        return f"Expected beside {PLAIN}{fits}: log loss {loss:+.3f}." if known else ""
    if found.misses_goal:
        return (
            f"The goal cannot be kept: {PLAIN} does not fit the budget, and no plan that fits surely stays "
            f"within {allowed} of its loss. A larger budget, time or tolerance helps."
        )
    if found.plan == found.reference:
        broad = "broad " if found.narrow.any() else ""
        return f"No cheaper {broad}plan surely stays within {allowed} of the loss of {PLAIN}, so it is {PLAIN}."
    if found.trained:
        return ""
    mean, worst = (
        0.0 - improvement_of(vote) for vote in (found.mean[found.plan], (found.mean - found.reach)[found.plan])
    )
    return f"Expected beside {PLAIN}: log loss {mean:+.3f}, surely at most {worst:+.3f}."


def lacks_room(found: Deliberation) -> bool:
    """Whether much is lost under a goal of quality because plain LoRA does not fit, as far as the networks can know.

    In a run unlike those that they have learned from, they do not know it.
    """
    loss = found.loss_beside_plain
    if loss is None or found.plain is None or found.goal.saves or unlike(found):
        return False
    return not found.may_take[found.plain] and loss > TOLERANCE


@dataclass(frozen=True, eq=False)
class FrontierPlan:
    """A plan on the frontier.

    Attributes:
        name: of the candidate that leads to it.
        ranks: int64 (modules,).
        cost: what it takes, in the unit of the budget.
        seconds: of a step; None where they are not known.
        loss: expected loss over that of plain LoRA: 1.02 is 2 % more.
        low: lower end of the interval of `loss`: as far from the mean vote as a decision doubts it; see
            `Deliberation.reach`.
        high: upper end.
        fits: whether it is within the budget; of plain LoRA alone it may be false.
        taken: whether the decision is this plan.
        narrow: whether a goal of cost may not take it, see `broad_plans`.
    """

    name: str
    ranks: IntArray
    cost: float
    seconds: float | None
    loss: float
    low: float
    high: float
    fits: bool
    taken: bool
    narrow: bool = False

    @property
    def verdict(self) -> str:
        """Beside plain LoRA, "better", "worse", or "tie" where the interval does not tell them apart."""
        return "worse" if self.low > 1 else "better" if self.high < 1 else "tie"


def frontier(found: Deliberation) -> list[FrontierPlan]:
    """The frontier of a decision, the cheapest plan first; with plain LoRA and the plan taken wherever they lie.

    What counts as cost is time under the goal "time", and else what the budget counts.

    Args:
        found: of a policy whose networks tell plans of any cost apart, at a run's first decision.

    Raises:
        ConfigError: the deliberation holds no plans of other costs.
    """
    if found.plain is None or found.costs is None:
        raise ConfigError("This decision weighed plans of one cost alone, so there is no frontier.")
    costs = found.seconds if found.goal.kind == "time" and found.seconds is not None else found.costs
    votes = found.votes - found.votes[:, [found.plain]]
    mean, others = votes.mean(axis=0), np.arange(len(found.plans)) != found.plain
    caution = found.lcb_coefficient if found.goal.saves else CAUTION
    reach = caution * votes.std(axis=0) + found.doubt * others
    shown = {*_undominated(costs, mean, found.may_take), found.plain, found.plan}
    return [
        _plan(found, plan, *(float(value) for value in (mean[plan], reach[plan])))
        for plan in sorted(shown, key=lambda plan: (costs[plan], -mean[plan]))
    ]


def _plan(found: Deliberation, plan: int, mean: float, reach: float) -> FrontierPlan:
    assert found.costs is not None
    loss, low, high = (math.exp(-improvement_of(vote)) for vote in (mean, mean + reach, mean - reach))
    return FrontierPlan(
        name=found.candidates[int(np.argmax(found.plan_of == plan))],
        ranks=found.plans[plan],
        cost=float(found.costs[plan]),
        seconds=None if found.seconds is None else float(found.seconds[plan]),
        loss=loss,
        low=low,
        high=high,
        fits=bool(found.may_take[plan]),
        narrow=found.goal.saves and bool(found.narrow[plan]),
        taken=plan == found.plan,
    )


def _undominated(costs: FloatArray, mean: FloatArray, allowed: BoolArray) -> Iterator[int]:
    """The plans that are better than all that cost less or as much."""
    best = -np.inf
    for plan in np.lexsort((-mean, costs)).tolist():
        if allowed[plan] and mean[plan] > best:
            best = float(mean[plan])
            yield plan


@dataclass(frozen=True, eq=False)
class Decision:
    """What a policy wants.

    Attributes:
        ranks: the wanted ranks, int64 (modules,); `project` rounds them down onto the ladder.
        scores: the log of each module's rank relative to the others, (modules,). Where the wanted ranks do not fit the
            budget, modules with low scores give way first.
        rank_floor: the rank floor from which the wanted ranks follow; 0 if they do not follow from scores.
        depth_bias: the depth bias from which they follow; 0 if they do not follow from scores.
        log_prob: log-probability of the plan; None for a policy that takes the same plan each time.
        expected: the improvement that the policy expects. With a value ensemble: over uniform rank, and at later
            decisions over no change, in the unit of the votes. Without one: over the rule that the policy started from,
            in shares of the headroom. 0 for a rule.
        uncertainty: standard deviation of `expected` over the members of the ensemble; 0 for a rule.
        exact: no more than the wanted ranks; what is left of the budget is left.
        deliberation: what the decision was chosen from; None for a policy without a value ensemble.
    """

    ranks: IntArray
    scores: FloatArray
    rank_floor: float = 0.0
    depth_bias: float = 0.0
    log_prob: float | None = None
    expected: float = 0.0
    uncertainty: float = 0.0
    exact: bool = False
    deliberation: Deliberation | None = None


class Policy(Protocol):
    """Decides ranks, for any number of modules and whatever their names are."""

    @property
    def name(self) -> str:
        """The name in logs and tables."""

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation."""


def decision_from_plan(ranks: IntArray) -> Decision:
    """The decision that wants these ranks, whole numbers from 0 on, (modules,), and prefers no module to another.

    Raises:
        ConfigError: they are something else.
    """
    values = np.asarray(ranks)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.all((values >= 0) & (values == np.floor(values))):
        raise ConfigError(f"Ranks are whole numbers from 0 on, one for each module; got {shown(ranks)}.")
    return Decision(values.astype(np.int64), np.zeros(len(values)))


def decision_to_keep(observation: Observation) -> Decision:
    """The decision that leaves all ranks as they are, even where the budget has room for more."""
    ranks = observation.problem.ranks
    return Decision(ranks, np.zeros(len(ranks)), exact=True)


def keeps(observation: Observation, decision: Decision) -> bool:
    """Whether a decision leaves all ranks as they are."""
    return decision.exact and bool(np.array_equal(decision.ranks, observation.problem.ranks))


def decided_plan(problem: AllocationProblem, decision: Decision) -> Plan:
    """The plan to which a decision leads: `project`, or if it is exact the wanted ranks as far as they fit."""
    return project(problem, decision.ranks, decision.scores, fill=not decision.exact)


def is_first(observation: Observation) -> bool:
    """Whether this is a run's first decision, which may use the whole ladder."""
    return observation.problem.max_step is None


def decision_from_scores(
    observation: Observation,
    scores: FloatArray,
    placement: Sequence[float] | FloatArray = (0.0, 0.0),
) -> Decision:
    """The decision that a policy's scores and placement lead to.

    Args:
        observation: of the decision.
        scores: the log of each module's rank relative to the others, (modules,).
        placement: log2 of a factor on the rank floor, and what is added to the depth bias; see `PLACEMENT`.

    Raises:
        ConfigError: the scores are no finite numbers, one for each module.
    """
    problem = observation.problem
    given, scores = scores, np.asarray(scores)
    if scores.shape != (len(observation.names),) or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all():
        raise ConfigError(
            f"Scores are finite numbers, one for each of {len(observation.names)} modules; got {shown(given)}."
        )
    scores = scores.astype(np.float64)
    rank_floor = float(base_rank_floor(problem) * 2.0 ** placement[0])
    depth_bias = float(base_depth_bias(problem) + placement[1])
    return Decision(pack(problem, scores, rank_floor, depth_bias), scores, rank_floor, depth_bias)
