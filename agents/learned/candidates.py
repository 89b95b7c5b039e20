"""Candidates: the actions from which a learned policy chooses at a decision.

Some are fixed: those of the rules and the actor's. Others are drawn. Their scores are weighted sums of the mean signal,
the cost of a rank, the relative depth and the actor's scores. Weights and placements are drawn from wide distributions,
because nobody knows in advance how deep adapters should go, or how far signals can be trusted.

A policy whose networks tell plans of any cost apart weighs more plans at a first decision: plain LoRA, those that
follow from a model's structure, and the fixed candidates under lower limits.

Plans that follow from the structure of a model alone: kinds of modules, and parts of its depth, at one rank or two.

Which kinds a task needs, and how deep adapters must go, decides more on real models than ranks do. Kinds are told apart
by shapes (`ModuleShapes`): *wide* modules have the inner side of their layer, as an MLP has; the
others, those of attention, are *narrow*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...common.arrays import BoolArray, FloatArray, IntArray
from ...cost.cost import ParameterCost, TimedCost, moment_costs, unit_cost
from ...lora.spec import REFERENCE_RANK
from ...plan.plan import SCORE_BOUND, base_rank_floor, least_ranks, uniform_ranks, uniform_window
from ...plan.problem import AllocationProblem
from ...plan.time_limit import dearer, under_limit
from ..deliberation import DRAWN
from ..observation import Observation, module_feature
from ..policy import Decision, decided_plan, decision_from_plan, decision_from_scores, decision_to_keep
from ..rules import signal_mean

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
