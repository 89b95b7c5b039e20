"""Loss, bytes and step time of many plans on one fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ...common.arrays import FloatArray
from ..harness import Estimate, bootstrap, interleave, paired_ratios, usual_step
from ..ledger import Ledger
from .finetunes import Code, Finetune, Reviews, train
from .plans import PLAN_COUNT, REFERENCE, REQUIRED, NamedPlan, named_plans


@dataclass(frozen=True)
class Course:
    """How long the comparison on one fine-tune is.

    Attributes:
        task: the fine-tune.
        seeds: runs of each plan.
        more_seeds: runs of `REFERENCE` and `REQUIRED`, at least `seeds`.
        rounds: timed steps of each plan.
        plans: names of the plans to run; None for all.
    """

    task: Finetune
    seeds: int
    more_seeds: int
    rounds: int
    plans: tuple[str, ...] | None = None

    @property
    def runs(self) -> int:
        """Training runs in all."""
        plans = len(self.plans) if self.plans else PLAN_COUNT
        return self.seeds * plans + 2 * (self.more_seeds - self.seeds)

    def seeds_of(self, plan: str) -> range:
        """The seeds of a plan's runs; those of two plans are paired."""
        return range(self.more_seeds if plan in (REFERENCE, REQUIRED) else self.seeds)


_QUICK_PLANS = (REFERENCE, "top half, rank 16", REQUIRED)
_MINILM_PLANS = (
    *(f"all-linear, rank {rank}" for rank in (1, 8, 16)),
    "top half, rank 16",
    "rule16 at 65 %",
    *(f"fracrule at {share} %" for share in (50, 65, 80)),
)
FULL: dict[str, Course] = {
    "minilm": Course(Reviews(steps=60), seeds=2, more_seeds=5, rounds=30, plans=_MINILM_PLANS),
    "llama": Course(Code(steps=120), seeds=3, more_seeds=5, rounds=40),
}
QUICK: dict[str, Course] = {
    "minilm": Course(Reviews(steps=2, rows=8, length=32, eval_rows=32), 1, 1, rounds=2, plans=_QUICK_PLANS),
    "llama": Course(Code(steps=10, eval_rows=64), seeds=2, more_seeds=2, rounds=5, plans=_QUICK_PLANS),
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one plan came to.

    Attributes:
        plan: the plan, with its prediction.
        measured_bytes: at the peak of a step on the largest batch.
        seconds: of steps on the largest batch, (rounds,).
        losses: held-out loss at the end by seed.
    """

    plan: NamedPlan
    measured_bytes: int
    seconds: FloatArray
    losses: Mapping[int, float]

    def step_ratio(self, reference: Outcome) -> Estimate:
        """Time of a step over the reference's in the same round, the median over rounds."""
        return bootstrap(paired_ratios(self.seconds, reference.seconds, 1), usual_step)

    def loss_difference(self, reference: Outcome) -> Estimate:
        """Held-out loss minus the reference's with the same seed, the mean over seeds."""
        seeds = sorted(self.losses.keys() & reference.losses.keys())
        return bootstrap(np.array([[self.losses[seed] - reference.losses[seed]] for seed in seeds]), _mean)


def _mean(values: FloatArray) -> FloatArray:
    return np.asarray(values.mean(axis=(-2, -1)), dtype=np.float64)


def plans_of(course: Course) -> dict[str, NamedPlan]:
    """The course's plans by name, priced on the largest batch."""
    learner, batch = course.task.learner(0), course.task.largest()
    learner.step(batch)  # the optimiser's state is there from now on
    plans = named_plans(learner.targets, learner.calibrate(batch).cost(), course.task.layers)
    return {name: plan for name, plan in plans.items() if course.plans is None or name in course.plans}


def time_plans(course: Course, plans: Mapping[str, NamedPlan]) -> dict[str, Any]:
    """Measure each plan's peak, then time one step of each in turn, all on the largest batch.

    Returns:
        By plan "bytes" and "seconds" of the steps.
    """
    batch, learners, measured = course.task.largest(), {}, {}
    for name, plan in plans.items():
        learner = learners[name] = course.task.learner(0)
        learner.set_ranks(plan.ranks)
        learner.step(batch)
        measured[name] = learner.measured_step(batch)

    def step(name: str, turn: int) -> None:
        learners[name].step(batch)

    device = learners[REFERENCE].device
    seconds = interleave({name: partial(step, name) for name in plans}, course.rounds, device)
    return {name: {"bytes": measured[name], "seconds": seconds[name].tolist()} for name in plans}


def _run(task: Finetune, ranks: list[int], seed: int) -> float:
    torch.set_num_threads(1)
    return train(task, ranks, seed)


def _jobs(course: Course, plans: Mapping[str, NamedPlan]) -> Iterator[tuple[dict[str, Any], NamedPlan, int]]:
    """What defines each run, seed by seed, so that an interrupted benchmark has whole pairs."""
    for seed in range(course.more_seeds):
        for name, plan in plans.items():
            if seed in course.seeds_of(name):
                yield _run_key(course, plan, seed), plan, seed


def _run_key(course: Course, plan: NamedPlan, seed: int) -> dict[str, Any]:
    return {"part": "loss", "task": repr(course.task), "ranks": plan.ranks.tolist(), "seed": seed}


def run_losses(
    course: Course,
    plans: Mapping[str, NamedPlan],
    ledger: Ledger,
    pool: Executor,
    on_run: Callable[[], object] | None = None,
) -> None:
    """Train every plan with every seed; results go into the ledger as they come.

    Args:
        course: how long.
        plans: what to train.
        ledger: holds the runs that are done.
        pool: where they run, several at a time.
        on_run: called after each run, those that were done before included.
    """
    waiting = {}
    for key, plan, seed in _jobs(course, plans):
        if ledger.get(key) is None:
            waiting[pool.submit(_run, course.task, plan.ranks.tolist(), seed)] = key
        elif on_run:
            on_run()
    for done in as_completed(waiting):
        ledger.add(waiting[done], done.result())
        if on_run:
            on_run()


def compare(
    course: Course, ledger: Ledger, pool: Executor, on_run: Callable[[], object] | None = None
) -> dict[str, Outcome]:
    """Run the whole course; returns outcomes by plan.

    Args:
        course: what to run.
        ledger: holds what is done.
        pool: for the training runs; steps are timed in this process, before the pool is busy.
        on_run: called after each training run.
    """
    plans = plans_of(course)
    ranks = {name: plan.ranks.tolist() for name, plan in plans.items()}
    key = {"part": "time", "task": repr(course.task), "ranks": ranks, "rounds": course.rounds}
    timed = ledger.fetch(key, partial(time_plans, course, plans))
    run_losses(course, plans, ledger, pool, on_run)
    return {
        name: Outcome(
            plan,
            timed[name]["bytes"],
            np.array(timed[name]["seconds"]),
            {seed: ledger.get(_run_key(course, plan, seed)) for seed in course.seeds_of(name)},
        )
        for name, plan in plans.items()
    }
