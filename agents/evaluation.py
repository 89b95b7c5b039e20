"""Compare policies on the same tasks, seeds and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import numpy as np
import torch

from ..env.episode import Episode, reference_of
from ..env.schedule import DecisionSchedule
from ..env.tasks import FineTune
from .policy import Policy


def run_episode(policy: Policy, task: FineTune, schedule: DecisionSchedule) -> float:
    """Improvement of one episode over the uniform run, as a share of the uniform run's gain (1 = twice the gain)."""
    reference = reference_of(task, schedule)
    episode = Episode(task, schedule)
    observation = episode.observe()
    while True:
        decision = policy.decide(observation)
        episode.apply(decision.deltas, decision.scores)
        loss = episode.advance()
        if episode.step == task.steps:
            return reference.improvement(episode.held_out_loss())
        observation = episode.observe(loss)


def _task_results(job: tuple[FineTune, Sequence[Policy], DecisionSchedule]) -> list[float]:
    task, policies, schedule = job
    torch.set_num_threads(1)
    return [run_episode(policy, task, schedule) for policy in policies]


def compare(
    policies: Sequence[Policy],
    tasks: Sequence[FineTune],
    schedule: DecisionSchedule,
    *,
    workers: int,
    on_task: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Improvements over uniform by policy name, one a task, in the order of the tasks.

    Args:
        policies: with different names.
        tasks: the same ones for each policy.
        schedule: when ranks are decided.
        workers: processes.
        on_task: called with the number of tasks done.
    """
    rows: dict[int, list[float]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(_task_results, (task, policies, schedule)): i for i, task in enumerate(tasks)}
        for done, job in enumerate(as_completed(jobs), start=1):
            rows[jobs[job]] = job.result()
            if on_task:
                on_task(done)
    return {policy.name: [rows[task][index] for task in range(len(tasks))] for index, policy in enumerate(policies)}


def mean_and_interval(values: Iterable[float], *, seed: int = 0, draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    array = np.asarray(list(values), dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = array[generator.integers(0, len(array), size=(draws, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def summarise(results: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """By policy: mean improvement over uniform, its interval, wins and losses against uniform."""
    summary = {}
    for name, values in results.items():
        mean, low, high = mean_and_interval(values)
        summary[name] = {
            "tasks": len(values),
            "improvement": mean,
            "low": low,
            "high": high,
            "wins": int(sum(value > 0 for value in values)),
            "losses": int(sum(value < 0 for value in values)),
        }
    return summary
