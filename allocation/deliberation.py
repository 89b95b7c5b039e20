"""What a learned policy computes at one decision: candidates, the plans that they lead to, and votes on the plans.

The policy's decision, the decision log and every explanation read this one object, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..common.arrays import Arrays, BoolArray, FloatArray, IntArray
from .features import MOST_FEATURE, RUN_FEATURES, run_feature_number, run_feature_text
from .goal import TOLERANCE, Goal, improvement_of

Votes = NDArray[np.float32]

Outside = tuple[float, float, float]
"""A value, and the lowest and highest one that are known."""

VoteUnit = Literal["spread", "log loss"]
"""What networks vote in: standard deviations of the log loss between plans that cost the same, or see `goal`."""

PLAIN = "rank 8 on all modules"
"""Plain LoRA, with which plans are compared, in words."""

COST_TIE = 0.01
"""Plans whose costs differ by less, as a share, are tied under a goal of cost."""

_OF_PLANS = ("costs", "seconds", "allowed", "broad")
"""Attributes with one value a plan, where they are known."""

DRAWN = "drawn "
"""How names of candidates begin that were drawn; their numbers follow, from 0 on. They come last."""


@dataclass(frozen=True, eq=False)
class Deliberation:
    """One deliberation; C candidates, P distinct plans, N value networks, L modules, D directions of the actor.

    Attributes:
        candidates: names of the candidates, (C,): "keep", rules, "actor", and numbers of those that were drawn.
        basis: what the candidates' scores are weighted sums of, names, (B,).
        weights: of the basis in the scores of each candidate, (C, B); all 0 for "keep".
        placements: of each candidate, see `PLACEMENT`, (C, 2).
        plan_of: the plan to which each candidate leads, int64 (C,). The first candidate's is the reference: uniform
            rank, or at later decisions the ranks in place; under a goal of cost plain LoRA, even if it does not fit.
        plans: ranks, int64 (P, L), all different, in the order in which candidates lead to them.
        votes: how much better than the reference each network expects each plan to be, in `unit`, float32 (N, P).
        lcb_coefficient: the lower bound is the mean vote less so many standard deviations.
        tie: plans whose lower bound is less than this below the best one's are tied with it, in the unit of votes.
        directions: names of the actor's directions, (D,).
        actor_gains: of each direction in the actor's scores, float64 (D,).
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
    basis: tuple[str, ...]
    weights: FloatArray
    placements: FloatArray
    plan_of: IntArray
    plans: IntArray
    votes: Votes
    lcb_coefficient: float
    tie: float
    directions: tuple[str, ...]
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

    @property
    def unlike(self) -> str:
        """In what the run is unlike those that the networks have learned from, in words; empty where it is not."""
        features = (
            run_feature_text(name, value)
            + f" (not {run_feature_number(name, low)} to {run_feature_number(name, high)})"
            for name, (value, low, high) in self.outside.items()
        )
        return ", ".join([*(["adapters that are trained already"] if self.trained else []), *features])

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
        if self.goal.saves and self.costs is not None:
            return self._cheapest
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
    def promise(self) -> str:
        """What is expected of the plan that is taken beside plain LoRA, in words; empty where nothing is known."""
        loss = self.loss_beside_plain
        if loss is None or self.plain is None:
            return ""
        rival, allowed = PLAIN, f"{self.goal.tolerance:.2g} (log)"
        if not self.goal.saves:
            fits = "" if self.may_take[self.plain] else ", which does not fit"
            known = self.plan != self.plain and not self.trained
            return f"Expected beside {rival}{fits}: log loss {loss:+.3f}." if known else ""
        if self.misses_goal:
            return (
                f"The goal cannot be kept: {rival} does not fit the budget, and no plan that fits surely stays "
                f"within {allowed} of its loss. A larger budget, time or tolerance helps."
            )
        if self.plan == self.reference:
            broad = "broad " if self.narrow.any() else ""
            return f"No cheaper {broad}plan surely stays within {allowed} of the loss of {rival}, so it is {rival}."
        if self.trained:
            return ""
        mean, worst = (
            0.0 - improvement_of(vote) for vote in (self.mean[self.plan], (self.mean - self.reach)[self.plan])
        )
        return f"Expected beside {rival}: log loss {mean:+.3f}, surely at most {worst:+.3f}."

    @property
    def loss_beside_plain(self) -> float | None:
        """The log loss that is expected of the plan, less that of plain LoRA; None where it is unknown."""
        if self.costs is None or self.plain is None:
            return None
        return 0.0 - improvement_of(float(self.mean[self.plan] - self.mean[self.plain]))

    @property
    def lacks_room(self) -> bool:
        """Whether much is lost under a goal of quality since plain LoRA does not fit, as networks expect that know it.

        In a run unlike those that they have learned from, they do not.
        """
        loss = self.loss_beside_plain
        if loss is None or self.plain is None or self.goal.saves or self.unlike:
            return False
        return not self.may_take[self.plain] and loss > TOLERANCE

    @property
    def _cheapest(self) -> BoolArray:
        if self.misses_goal:
            return np.asarray(np.arange(len(self.plans)) == self.simple)
        costs = self.seconds if self.goal.kind == "time" else self.costs
        assert costs is not None
        least = costs[self.within_tolerance].min()
        return np.asarray(self.within_tolerance & (costs <= (1 + COST_TIE) * least))

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

    @property
    def log_prob(self) -> float | None:
        """The log-probability of the plan; None where plans are not drawn."""
        return float(np.log(self.probabilities[self.plan])) if self.temperature else None

    def recipes(self) -> Arrays:
        """What the candidates are made of, which is the same at many decisions: those that were drawn."""
        return {"weights": self.weights[self._fixed :], "placements": self.placements[self._fixed :]}

    def arrays(self) -> Arrays:
        """All other arrays by name, in the smallest types that hold them exactly."""
        return {
            "weights": self.weights[: self._fixed],
            "placements": self.placements[: self._fixed],
            "plan_of": self.plan_of.astype(np.uint16),
            "plans": self.plans.astype(np.uint16),
            "votes": self.votes,
            "actor_gains": self.actor_gains.astype(np.float32),
            "actor_estimate": self.actor_estimate.astype(np.float32),
            "actor_scores": self.actor_scores.astype(np.float32),
            "probabilities": self.probabilities,
            **{name: values for name in _OF_PLANS if (values := getattr(self, name)) is not None},
        }

    def scalars(self) -> dict[str, Any]:
        """All that is no array, as JSON values."""
        return {
            "candidates": list(self.candidates[: self._fixed]),
            "basis": list(self.basis),
            "directions": list(self.directions),
            "lcb_coefficient": self.lcb_coefficient,
            "tie": self.tie,
            "temperature": self.temperature,
            "seed": self.seed,
            "taken": self.taken,
            **{name: getattr(self, name) for name in ("unit", "doubt", "simple", "plain")},
            "outside": {name: list(values) for name, values in self.outside.items()},
            "trained": self.trained,
            "goal": [self.goal.kind, self.goal.tolerance],
        }

    @property
    def _fixed(self) -> int:
        """How many candidates have a name of their own; those that were drawn follow."""
        return sum(not name.startswith(DRAWN) for name in self.candidates)

    @classmethod
    def restored(
        cls, arrays: Mapping[str, NDArray[Any]], recipes: Mapping[str, NDArray[Any]], scalars: Mapping[str, Any]
    ) -> Deliberation:
        """The deliberation that `arrays`, `recipes` and `scalars` described.

        Raises:
            KeyError: a part is missing.
            ValueError: parts disagree on their sizes, or have other types.
        """
        for name, array in (*arrays.items(), *recipes.items()):
            kinds = "iu" if name in ("plan_of", "plans") else "b" if name in ("allowed", "broad") else "f"
            if array.dtype.kind not in kinds or array.dtype == np.uint64:
                raise ValueError(f"{name} is of type {array.dtype}")
        values: dict[str, Any] = {
            name: tuple(map(str, scalars[name])) for name in ("candidates", "basis", "directions")
        }
        values["candidates"] += tuple(f"{DRAWN}{number}" for number in range(len(recipes["weights"])))
        values |= {name: np.concatenate([arrays[name], recipes[name]]) for name in ("weights", "placements")}
        doubles = ("actor_gains", "actor_estimate", "actor_scores")
        values |= {name: arrays[name].astype(np.float64) for name in doubles}
        values |= {name: arrays[name].astype(np.int64) for name in ("plan_of", "plans")}
        values |= {name: float(scalars[name]) for name in ("lcb_coefficient", "tie", "temperature")}
        values |= {name: arrays[name] for name in _OF_PLANS if name in arrays}
        values |= {name: scalars.get(name) for name in ("simple", "plain")}
        kind, tolerance = scalars.get("goal", ("quality", TOLERANCE))  # unknown to earlier versions, as the unit
        values |= {"goal": Goal(kind, tolerance), "unit": scalars.get("unit", "spread")}
        values["doubt"] = float(scalars.get("doubt", 0.0))
        values["outside"] = {name: tuple(map(float, found)) for name, found in scalars.get("outside", {}).items()}
        values["trained"] = bool(scalars.get("trained", False))
        found = cls(**values, votes=arrays["votes"], seed=int(scalars["seed"]), taken=int(scalars["taken"]))
        found._check_sizes()
        return found

    def _check_sizes(self) -> None:
        candidates, (plans, modules) = len(self.candidates), self.plans.shape
        expected = {
            "weights": (candidates, len(self.basis)),
            "placements": (candidates, 2),
            "plan_of": (candidates,),
            "votes": (len(self.votes), plans),
            "actor_gains": (len(self.directions),),
            "actor_estimate": (modules,),
            "actor_scores": (modules,),
            **{name: (plans,) for name in _OF_PLANS if getattr(self, name) is not None},
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, not {shape}")
        if not (0 <= self.taken < candidates and self.plan_of.min() >= 0 and self.plan_of.max() < plans):
            raise ValueError(f"a candidate or plan is out of range: {self.taken} of {candidates}, {plans} plans")
        if not all(each is None or (type(each) is int and 0 <= each < plans) for each in (self.simple, self.plain)):
            raise ValueError(f"the simple or the plain plan is out of range: {self.simple!r}, {self.plain!r}")
        for name, found in self.outside.items():
            if name not in RUN_FEATURES or len(found) != 3 or not all(abs(value) <= MOST_FEATURE for value in found):
                raise ValueError(f"{name!r} is outside of its range with {found}")
        if self.plans.min(initial=0) < 0 or modules == 0 or len(self.votes) == 0 or self.unit not in get_args(VoteUnit):
            raise ValueError(f"{len(self.votes)} votes in {self.unit!r} on plans for {modules} modules")


def plan_distance(ranks: IntArray, reference: IntArray) -> FloatArray:
    """How far plans are from a reference: the mean of abs(log2(1 + rank) - log2(1 + reference)) over the modules.

    Args:
        ranks: (..., modules).
        reference: (modules,).

    Returns:
        Distances, (...).
    """
    return np.asarray(np.abs(np.log2(1.0 + ranks) - np.log2(1.0 + reference)).mean(axis=-1))
