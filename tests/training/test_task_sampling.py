"""Fresh tasks: like their suite, and not one of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rankpilot.env.proxy_task import ProxyTask, load_suite
from rankpilot.env.suite_names import SUITES
from rankpilot.training.task_sampling import vary


def fresh(suite: str, seeds: range) -> list[tuple[ProxyTask, ProxyTask]]:
    """Templates, and what was made of each."""
    tasks = load_suite(suite, "train")
    drawn = [replace(tasks[seed % len(tasks)], seed=seed) for seed in seeds]
    return [(task, vary(task, tasks)) for task in drawn]


@pytest.mark.parametrize("suite", SUITES)
def test_what_stays(suite: str) -> None:
    """What decides the price of a plan, and the seed; nothing that was measured on the template holds any more."""
    for task, varied in fresh(suite, range(80)):
        for name in ("seed", "base", "unit", "checkpointing", "priced_rows", "steps", "batch_size", "length"):
            assert getattr(varied, name) == getattr(task, name)
        assert varied.reference is None


@pytest.mark.parametrize("suite", SUITES)
def test_what_is_learned_is_drawn_from_the_suite(suite: str) -> None:
    tasks = load_suite(suite, "train")
    places = {(task.kind, task.placement, task.corpus) for task in tasks}
    assert {(v.kind, v.placement, v.corpus) for _, v in fresh(suite, range(200))} == places


@pytest.mark.parametrize("suite", SUITES)
def test_budgets_lie_between_those_of_like_tasks(suite: str) -> None:
    tasks, between = load_suite(suite, "train"), 0
    for task, varied in fresh(suite, range(200)):
        alike = [
            other.budget
            for other in tasks
            if (other.base, other.cost_kind, other.priced_rows) == (task.base, task.cost_kind, task.priced_rows)
        ]
        assert min(alike) * 0.99 <= varied.budget <= max(alike) * 1.01
        between += varied.budget not in alike
    assert between > 100, "most are new"


@pytest.mark.parametrize("suite", SUITES)
def test_the_learning_rate_is_that_of_the_nearest_task(suite: str) -> None:
    tasks = load_suite(suite, "train")
    rates = {task.learning_rate for task in tasks}
    assert all(varied.learning_rate in rates for _, varied in fresh(suite, range(80)))
    low, high = (replace(tasks[0], budget=budget, learning_rate=rate) for budget, rate in ((0.2, 4e-3), (0.8, 1.6e-2)))
    for seed in range(20):
        varied = vary(replace(low, seed=seed), (low, high))
        assert varied.learning_rate == (4e-3 if varied.budget < 0.4 else 1.6e-2)


def test_the_seed_decides() -> None:
    tasks = load_suite("shift", "train")
    task = replace(tasks[0], seed=5)
    assert vary(task, tasks) == vary(task, tasks)
    assert len({vary(replace(task, seed=seed), tasks).budget for seed in range(10)}) > 3
