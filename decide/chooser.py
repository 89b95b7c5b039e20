"""The default policy: at the first decision, choose the best plan for the goal by expected loss.

The candidate list is short: one rank, or one per kind of module, on the parts of a model with a measurable effect
(kinds, depths, every other layer); the distribution of ranks within a kind made no difference on real texts
(benchmarks/EXPERIMENTS.md). If the parameter budget is too small for rank 1 on every other layer, coverage decides: one
module per layer. Each candidate has a computed cost, and an expected loss with a spread, learned from real fine-tunes
(`decide/plan/worth.py`). `Choice.best` is the decision. Later decisions keep the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.errors import ConfigError
from ..cost.cost import ParameterCost, moment_costs
from ..lora.spec import REFERENCE_RANK
from .choice import PLAIN, PLAIN_WITHIN, Choice
from .observation import RUN_FEATURES, Observation, learns_labels, module_feature
from .plan.goal import Goal
from .plan.plan import top_down
from .plan.problem import AllocationProblem
from .plan.worth import KNOWN, Modules, PlanWorth, octaves_beyond, packaged_worth
from .policy import Decision, Policy, decision_to_keep, is_first

DEFAULT = "default"
"""Name of the default policy."""

RANKS = (1, 2, 4, REFERENCE_RANK, 16, 32, 64, 128)
"""Candidate ranks."""

PAIRS = ((16, 4), (32, 8), (64, 16))
"""Rank pairs of candidates favoring one kind of module, the larger first."""

MOST_WINDOWS = 32
"""Maximum number of candidates adapting all layers from some layer up; deeper models use a coarser step."""

NEW_RANK = 1
"""Rank of new adapters at the first decision; continued adapters keep the ranks of their earlier run."""

STRANGE_SPREAD = 3.0
"""Minimum factor on the spread for a run with a caveat, i.e. unlike the runs behind the expectations. Measured on
labels (benchmarks/EXPERIMENTS.md)."""

OF_AN_OCTAVE = 0.5
"""Growth of that minimum factor per doubling of width, layers or steps beyond the known range, as a share of it."""

KINDS = {"MLP": True, "attention": False}
"""Kinds of modules, mapped to True if they have the wide inner side of their layer."""


def parts(observation: Observation) -> dict[str, BoolArray]:
    """Modules of each part of a model by name, bool (modules,); all modules first, no duplicates, none empty."""
    wide = module_feature(observation, "wide") > 0.5
    _, turn = np.unique(observation.problem.blocks, return_inverse=True)
    count = int(turn.max()) + 1
    step = -(-count // MOST_WINDOWS)
    depths = {"": np.ones(len(wide), dtype=np.bool_)}
    depths |= {f" of the top {_layers(count - low)}": turn >= low for low in range(step, count, step)}
    depths |= {" of every other layer": (count - 1 - turn) % 2 == 0}
    found: dict[str, BoolArray] = {}
    for where, part in depths.items():
        found[f"all modules{where}"] = part
        found |= {f"the {kind} modules{where}": part & (wide == is_wide) for kind, is_wide in KINDS.items()}
    distinct: dict[bytes, str] = {}
    for name, part in found.items():
        distinct.setdefault(part.tobytes(), name)
    return {name: found[name] for name in distinct.values() if found[name].any()}


def _layers(count: int) -> str:
    return "layer" if count == 1 else f"{count} layers"


def outputs(observation: Observation) -> dict[str, BoolArray]:
    """One part by name, MLP outputs, if parameters are too few for rank 1 on every other layer; else empty.

    They are in all layers, in every second one from the top, or in fewer, to fit at rank 1. Measured at mean ranks of
    an eighth to a half on gated MLPs, with one module in seven an MLP output, and valid for those alone
    (benchmarks/EXPERIMENTS.md). The worth of plans was learned at higher ranks, and would adapt a few whole layers.
    """
    problem = observation.problem
    _, turn = np.unique(problem.blocks, return_inverse=True)
    below_top = turn.max() - turn
    other_layers = _within(problem, (below_top % 2 == 0).astype(np.int64))
    if not isinstance(problem.cost, ParameterCost) or problem.fits(other_layers):
        return {}
    wide, shape = module_feature(observation, "wide") > 0.5, module_feature(observation, "shape")
    leads_out = wide & (shape < 0)
    if (wide & (shape > 0)).sum() < 2 * leads_out.sum():
        return {}
    for every in range(1, int(turn.max()) + 2):
        part = leads_out & (below_top % every == 0)
        ranks = _within(problem, part.astype(np.int64))
        if ranks.any() and problem.fits(ranks):
            where = "" if every == 1 else f" of one layer in {every}"
            return {f"the outputs of MLPs{where}": part}
    return {}


def candidates(observation: Observation) -> Iterator[tuple[str, IntArray]]:
    """Yield plans by name: plain LoRA unclipped, then plans within bounds, int64 (modules,), ignoring the limit."""
    problem = observation.problem
    yield PLAIN, plain_lora(problem)
    yield PLAIN_WITHIN, _within(problem, plain_lora(problem))
    wide, few = module_feature(observation, "wide") > 0.5, outputs(observation)
    if not few:
        yield "as much rank as fits", top_down(problem)
    for name, part in (few or parts(observation)).items():
        for rank in problem.ladder.ranks[1:] if few else RANKS:
            if (named := f"rank {rank} on {name}") != PLAIN:
                yield named, _within(problem, np.where(part, rank, 0))
    for more, less in PAIRS:
        for kind, is_wide in KINDS.items():
            ranks = np.where(wide == is_wide, more, less)
            yield f"rank {more} on the {kind} modules and {less} on the others", _within(problem, ranks)


def plain_lora(problem: AllocationProblem) -> IntArray:
    """Rank 8 on every target module, or its highest on the ladder, int64 (modules,); ignores bounds and limit."""
    return problem.ladder.array[problem.ladder.rung(np.minimum(REFERENCE_RANK, problem.max_ranks))]


def _within(problem: AllocationProblem, ranks: IntArray) -> IntArray:
    """Clip ranks to the ladder and the bounds, int64 (modules,)."""
    rungs = problem.ladder.rung(np.minimum(ranks, problem.max_ranks))
    return problem.ladder.array[np.clip(rungs, problem.bottoms, problem.tops)]


@dataclass(frozen=True)
class PlanChooser:
    """Takes the best plan for its goal at the first decision, and keeps it.

    Attributes:
        name: the name in logs and tables.
        goal: goal of the choice.
        worth: model of the worth of plans; by default the fit included in the package.
    """

    reads_signals: ClassVar[bool] = False
    name: str = DEFAULT
    goal: Goal = Goal()  # noqa: RUF009  (it is frozen)
    worth: PlanWorth | None = None

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation.

        Raises:
            ConfigError: plan costs lack a quantity required by the goal.
        """
        if not is_first(observation):
            return decision_to_keep(observation)
        found = self.weigh(observation)
        ranks = found.plans[found.taken]
        return Decision(ranks, np.zeros(len(ranks)), exact=True, choice=found)

    def weigh(self, observation: Observation) -> Choice:
        """Return the choice of a first decision.

        Raises:
            ConfigError: see `decide`.
        """
        problem, worth = observation.problem, self.worth or packaged_worth()
        if self.goal.kind == "time" and problem.time is None:
            raise ConfigError("goal='time' requires a known step time, which is not available here.")
        if self.goal.kind == "bytes" and problem.cost.unit != "bytes":
            raise ConfigError(f"goal='bytes' requires a budget in bytes; this one counts {problem.cost.unit}.")
        names, plans, fits, costs = _that_fit(observation)
        features = modules_of(observation).features(plans)
        beyond = dict(_beyond(observation))
        caveats = (*_caveats(observation), *beyond)
        strangeness = STRANGE_SPREAD * (1 + OF_AN_OCTAVE * sum(beyond.values())) if caveats else 1.0
        found = Choice(
            names=names, plans=plans, parts=worth.parts(features), spread=worth.spread(features) * strangeness,
            costs=costs, fits=fits, goal=self.goal, caveats=caveats,
            seconds=problem.time(plans) if problem.time else None,
        )  # fmt: skip
        return replace(found, taken=found.best)


def _caveats(observation: Observation) -> Iterator[str]:
    """Yield differences between a run and the runs behind the expectations, as text."""
    if learns_labels(observation.run.tolist()):
        yield "it learns labels, not texts"
    if (observation.problem.ranks > NEW_RANK).any():
        yield "its adapters are already trained"


def _beyond(observation: Observation) -> Iterator[tuple[str, float]]:
    """Yield each quantity of a run outside the known range, as text, and the excess in doublings."""
    layers = len(np.unique(observation.problem.blocks))
    steps = 10 ** (2 + float(observation.run[RUN_FEATURES.index("horizon")]))
    for name, value in {"width": modules_of(observation).width, "layers": layers, "steps": steps}.items():
        low, high = KNOWN[name]
        if octaves := octaves_beyond(name, value):
            yield f"{name} {value:,.0f} (not {low} to {high})", octaves


def modules_of(observation: Observation) -> Modules:
    """Properties of an observation's model needed for the worth of plans."""
    wide, depth = module_feature(observation, "wide") > 0.5, module_feature(observation, "relative_depth")
    problem = observation.problem
    return Modules(wide, depth, float(problem.max_ranks.max()), plain_lora(problem))


def _that_fit(observation: Observation) -> tuple[tuple[str, ...], IntArray, BoolArray, FloatArray]:
    """Return distinct candidates that fit, after plain LoRA.

    Returns:
        Names, ranks (plans, modules), mask of plans that fit, and costs, (plans,).
    """
    problem = observation.problem
    names, listed = zip(*candidates(observation), strict=True)
    plans = np.stack(listed)
    costs = moment_costs(problem.cost, plans).max(axis=1)
    can = (costs <= problem.limit) & plans.any(axis=1)
    can[0] &= np.array_equal(_within(problem, plans[0]), plans[0])
    shown = can.copy()
    shown[0] = True
    _, first = np.unique(plans, axis=0, return_index=True)
    shown &= np.isin(np.arange(len(plans)), first)
    kept = np.flatnonzero(shown)
    return tuple(names[index] for index in kept.tolist()), plans[kept], can[kept], costs[kept]


def with_goal(policy: Policy, goal: Goal) -> Policy:
    """Return the policy with a goal set.

    Raises:
        ConfigError: the goal is to save cost, and the policy predicts nothing about plans.
    """
    if isinstance(policy, PlanChooser):
        return replace(policy, goal=goal)
    if goal.saves:
        check_expects(policy, f"goal={goal.kind!r}", "use goal='quality'")
    return policy


def check_expects(policy: Policy, what: str, instead: str) -> None:
    """Check that a policy can predict the loss of a cheaper plan.

    Args:
        policy: the policy.
        what: feature in need of it, for the error.
        instead: suggested alternative.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(policy, PlanChooser):
        name = policy.name
        raise ConfigError(f"{name} predicts no losses, so {what} requires policy={DEFAULT!r}. Otherwise, {instead}.")
