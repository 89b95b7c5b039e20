"""Tasks of which the expected outcome of every plan is known: what off-policy estimates are held against.

* *closed form*: module m is worth w_m log(1 + rank_m), and the loss is 10 minus twice the weighted mean of that.
* *planted*: the changes of a teacher are known, so the loss that a plan can reach is computed without training
  (`attainable_loss`); a twentieth of the untrained loss is added, since no training gets all the way.

An outcome is minus the log loss, less that of uniform rank on the same task, whose run is taken as known: tasks differ
much more in their losses than plans do. A policy sees signals that tell the worth of a module with an error. Candidates
lead to a few distinct plans a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..allocation.plan import pack
from ..allocation.problem import AllocationProblem
from ..common.arrays import FloatArray, IntArray
from ..env.proxies.adapted import adapted_base
from ..env.tasks.oracle import attainable_loss, utilities
from ..env.tasks.proxy_finetune import ProxyFineTune
from ..env.tasks.proxy_task import PLACEMENTS, ProxyTask
from ..lora.module_spec import ModuleSpec
from ..memory.budget import reference_cost
from ..memory.cost import ParameterCost
from ..study.off_policy.cross_fit import Predict, cross_fit
from ..study.off_policy.logged import LoggedChoices
from ..study.off_policy.targets import TargetPolicy

NOISE = 0.03
"""Standard deviation of an outcome around its expectation, in log loss."""

CANDIDATES = 10
"""Candidates of a task, beside uniform rank."""

_MODULES = [ModuleSpec(f"layers.{index}.proj", index, 64, 64) for index in range(12)]
_SIGNAL_ERROR = 0.7
"""Standard deviation of a signal's error over that of the true log worth."""

_BEHAVIOUR = np.array([1.0, 0.2, 0.2, 0.3, 0.0])
"""By which weights on the features of plans the logged policy values them."""

_BASES = ("llama-4x32", "bert-4x32", "gpt2-4x32")


@dataclass(frozen=True, eq=False)
class KnownLog:
    """A log of tasks whose outcomes are known.

    Attributes:
        choices: with cross-fitted predictions of a ridge regression.
        targets: policies at these decisions.
        expected: the expected outcome of each plan that was taken, (decisions,).
    """

    choices: LoggedChoices
    targets: list[TargetPolicy]
    expected: FloatArray


@dataclass(frozen=True, eq=False)
class KnownOutcomes:
    """A pool of tasks, which stands for all tasks that there are.

    Attributes:
        plans: distinct plans of each task, int64 (tasks,).
        features: of each plan, in standard deviations of its task's plans, (sum of plans, 5).
        gains: the expected outcome of each plan, (sum of plans,).
    """

    plans: IntArray
    features: FloatArray
    gains: FloatArray

    @property
    def _layout(self) -> LoggedChoices:
        """The pool as choices, for what is done task by task."""
        count = len(self.plans)
        return LoggedChoices(range(count), self.plans, np.zeros(count, dtype=np.int64), np.zeros(count))

    def target(self, name: str, weights: FloatArray, temperature: float) -> TargetPolicy:
        """A policy for all tasks of the pool.

        Args:
            name: of it.
            weights: of the features, in the value of a plan.
            temperature: of a softmax over values, in standard deviations of a task's values; 0 to take the best plan.
        """
        layout, values = self._layout, self.features @ weights
        if not temperature:
            return TargetPolicy.greedy(name, layout, values)
        means = layout.sums(values) / self.plans
        spread = np.sqrt(layout.sums((values - means[layout.decision_of]) ** 2) / self.plans) + 1e-9
        likely = np.exp((values - means[layout.decision_of]) / (temperature * spread)[layout.decision_of])
        return TargetPolicy(name, likely / layout.sums(likely)[layout.decision_of], values)

    def targets(self, count: int, seed: int) -> list[TargetPolicy]:
        """Policies that value plans more or less as the logged policy does; every other one takes the best plan."""
        generator, targets = np.random.default_rng(seed), []
        for number in range(count):
            weights = _BEHAVIOUR + generator.choice([0.3, 1.0, 2.0]) * generator.normal(size=len(_BEHAVIOUR))
            temperature = generator.choice([0.5, 1.0]) if number % 2 else 0.0
            targets.append(self.target(f"{number}", weights, temperature))
        return targets

    def truth(self, target: TargetPolicy) -> float:
        """The expected outcome of a target on a task of the pool."""
        return float(self._layout.sums(target.probabilities * self.gains).mean())

    def log(
        self,
        targets: Sequence[TargetPolicy],
        *,
        tasks: int,
        runs: int,
        temperature: float,
        generator: np.random.Generator,
    ) -> KnownLog:
        """Draw tasks from the pool, and let the logged policy decide: a softmax over its values of plans.

        Args:
            targets: policies for the pool.
            tasks: how many are drawn, with replacement.
            runs: decisions of each.
            temperature: of the logged policy; see `target`.
            generator: draws everything.
        """
        pool = self._layout
        drawn = np.repeat(generator.integers(len(self.plans), size=tasks), runs)
        places, plans = pool.plans_of(drawn), self.plans[drawn]
        probabilities = self.target("logged", _BEHAVIOUR, temperature).probabilities[places]
        starts = np.cumsum(plans) - plans
        ends = np.cumsum(probabilities) - np.repeat(np.arange(len(drawn)), plans)
        below = ends < np.repeat(generator.random(len(drawn)), plans)
        chosen = np.minimum(np.add.reduceat(below.astype(np.int64), starts), plans - 1)
        expected = self.gains[places[starts + chosen]]
        outcomes = expected + NOISE * generator.normal(size=len(drawn))
        numbers = np.repeat(np.arange(tasks), runs).tolist()
        choices = LoggedChoices(numbers, plans, chosen, outcomes, probabilities)
        here = [TargetPolicy(each.name, each.probabilities[places], each.ranking[places]) for each in targets]
        return KnownLog(cross_fit(choices, ridge(choices, self.features[places])), here, expected)


def ridge(choices: LoggedChoices, features: FloatArray) -> Callable[[IntArray], Predict]:
    """A ridge regression of outcomes on the features of plans, (sum of plans, features), for `cross_fit`."""
    whole = np.column_stack([np.ones(len(features)), features])
    taken = whole[choices.starts + choices.chosen]

    def fit(decisions: IntArray) -> Predict:
        rows = taken[decisions]
        penalty = np.diag([0.0, *np.ones(features.shape[1])])
        weights = np.linalg.solve(rows.T @ rows + penalty, rows.T @ choices.outcomes[decisions])
        return lambda held_out: np.asarray(whole[choices.plans_of(held_out)] @ weights)

    return fit


def closed_form(tasks: int, seed: int = 0) -> KnownOutcomes:
    """A pool of tasks whose loss is a formula."""
    cost = ParameterCost.of(_MODULES)
    parts = []
    for number in range(tasks):
        generator = np.random.default_rng([seed, number])
        log_worth = generator.normal(size=len(_MODULES))
        worth = np.exp(log_worth) / np.exp(log_worth).sum()
        limit = generator.uniform(0.3, 1.0) * reference_cost(cost, np.full(len(_MODULES), 64))
        problem, signal = AllocationProblem.of(_MODULES, cost, limit), _signal(log_worth, generator)
        ranks = _plans(problem, signal, generator)
        parts.append(_part(ranks, 10 - 2 * np.log1p(ranks) @ worth, signal))
    return _pool(parts)


def planted(tasks: int, seed: int = 0) -> KnownOutcomes:
    """A pool of planted tasks on the smallest proxies, whose outcome is computed without training."""
    parts = []
    for number in range(tasks):
        generator = np.random.default_rng([seed, number])
        budget, place = float(generator.uniform(0.1, 0.4)), PLACEMENTS[int(generator.integers(len(PLACEMENTS)))]
        task = ProxyTask(
            "planted", 1000 * seed + number, base=_BASES[number % len(_BASES)], budget=budget, unit="parameters",
            placement=place, steps=1, batch_size=1, length=16, eval_rows=32,
        )  # fmt: skip
        modules, cost = adapted_base(task.base)[1], ProxyFineTune(task).cost()
        most = np.array([module.max_rank for module in modules])
        limit = ProxyFineTune(task).limit.resolve(cost, most, torch.device("cpu")).value
        problem = AllocationProblem.of(modules, cost, limit)
        worth = utilities(task, problem)[:, -1]
        signal = _signal(np.log(worth + 0.05 * worth.mean()), generator)
        ranks = _plans(problem, signal, generator)
        untrained = attainable_loss(task, np.zeros_like(most))
        losses = np.array([attainable_loss(task, plan) for plan in ranks]) + 0.05 * untrained
        parts.append(_part(ranks, losses, signal))
    return _pool(parts)


def _signal(log_worth: FloatArray, generator: np.random.Generator) -> FloatArray:
    """What a policy sees of the worth of modules, with mean 0 and standard deviation 1, (modules,)."""
    seen = log_worth + _SIGNAL_ERROR * log_worth.std() * generator.normal(size=len(log_worth))
    return np.asarray((seen - seen.mean()) / seen.std())


def _plans(problem: AllocationProblem, signal: FloatArray, generator: np.random.Generator) -> IntArray:
    """The distinct plans of uniform rank, which comes first, and of candidates, (plans, modules)."""
    height = problem.blocks / problem.blocks.max() - 0.5
    found = [pack(problem, np.zeros(len(signal)), 1.0, 0.0)]
    for _ in range(CANDIDATES):
        gain, rise, noise = generator.choice([0.0, 0.5, 1.0]), generator.normal(0, 1), 0.3
        scores = gain * signal + rise * height + noise * generator.normal(size=len(signal))
        found.append(pack(problem, scores, float(generator.choice([1.0, 2.0, 4.0])), 0.0))
    _, first = np.unique(np.stack(found), axis=0, return_index=True)
    return np.stack(found)[np.sort(first)]


def _part(ranks: IntArray, losses: FloatArray, signal: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Features and gains over uniform rank of a task's plans."""
    return _features(ranks, signal), np.log(losses[0]) - np.log(losses)


def _features(ranks: IntArray, signal: FloatArray) -> FloatArray:
    """What policies look at in plans, in standard deviations of the task's plans, (plans, 5)."""
    logs, height = np.log2(1 + ranks), np.linspace(-1, 1, len(signal))
    columns = [logs @ signal, logs @ height, (ranks > 0).sum(axis=1), logs.sum(axis=1), logs.std(axis=1)]
    values = np.stack(columns, axis=1)
    spread = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(spread > 1e-9, spread, 1))


def _pool(parts: Sequence[tuple[FloatArray, FloatArray]]) -> KnownOutcomes:
    plans = np.array([len(gains) for _, gains in parts])
    return KnownOutcomes(plans, *(np.concatenate(values) for values in zip(*parts, strict=True)))
