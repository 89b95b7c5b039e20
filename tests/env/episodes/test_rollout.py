"""Rounds: many episodes decision by decision, each as if it flew alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.allocation.plan import Plan
from rankpilot.allocation.problem import AllocationProblem
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.env.episodes.rollout import Rollout
from rankpilot.env.episodes.stacked import StackedEpisodes
from rankpilot.env.reward import churn_cost
from rankpilot.env.tasks.finetune import Reference
from rankpilot.env.tasks.proxy_task import ProxyTask
from rankpilot.errors import ConfigError

MakeTask = Callable[..., ProxyTask]
REFERENCE = Reference(3.0, 2.5, 2.4)
SCHEDULE = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.3, 0.6))


@pytest.fixture(scope="module")
def tasks(make_task: MakeTask) -> list[ProxyTask]:
    """Three, of which the last one cannot be trained."""
    kinds = [make_task(kind, seed, steps=8, reference=REFERENCE) for seed, kind in enumerate(("shift", "planted"))]
    return [*kinds, replace(kinds[0], learning_rate=1e30, seed=9)]


@pytest.fixture(scope="module")
def engine(tasks: list[ProxyTask]) -> StackedEpisodes:
    return StackedEpisodes(tasks[0].base, SCHEDULE, 4)


def decision(task: ProxyTask, turn: int, problem: AllocationProblem) -> Any:
    generator, count = np.random.default_rng([task.seed, turn]), len(problem.ranks)
    return problem.ladder.step(problem.ranks, generator.integers(-10, 11, count)), generator.normal(size=count)


def play(engine: StackedEpisodes, tasks: Sequence[ProxyTask]) -> tuple[Rollout, list[list[Any]]]:
    """A whole round of random decisions; also the ranks that were seen at each."""
    found, ranks = Rollout(engine, tasks), []
    while found.flying:
        ranks.append([observation.problem.ranks for observation in found.observations])
        problems = [observation.problem for observation in found.observations]
        found.step({slot: decision(task, found.decisions, problems[slot]) for slot, task in enumerate(tasks)})
    return found, ranks


@pytest.fixture(scope="module")
def together(engine: StackedEpisodes, tasks: list[ProxyTask]) -> tuple[Rollout, list[list[Any]], list[float]]:
    found, ranks = play(engine, tasks)
    return found, ranks, found.losses()


def test_all_begin_and_end_together(together: tuple[Rollout, list[list[Any]], list[float]]) -> None:
    found, ranks, losses = together
    assert not found.flying
    assert found.decisions == len(ranks) == 3
    assert [math.isfinite(loss) for loss in losses] == [True, True, False]


def test_an_episode_ends_as_if_alone(
    engine: StackedEpisodes, tasks: list[ProxyTask], together: tuple[Rollout, list[list[Any]], list[float]]
) -> None:
    """The failed one beside it included."""
    alone = []
    for task in tasks[:2]:
        found, _ = play(engine, [task])
        alone += found.losses()
    assert alone == together[2][:2]


def test_a_failed_episode_sits_out(together: tuple[Rollout, list[list[Any]], list[float]]) -> None:
    found, ranks, _ = together
    assert (ranks[1][2] == ranks[2][2]).all(), "what is seen of it stays as it was"
    assert found.churn[2] == 0
    assert (ranks[1][0] != ranks[2][0]).any()


def test_a_round_of_failures_ends(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    found = Rollout(engine, [tasks[2], tasks[2]])
    found.step(dict.fromkeys(range(2), decision(tasks[2], 0, found.observations[0].problem)))
    assert not found.flying
    found.step(dict.fromkeys(range(2), decision(tasks[2], 1, found.observations[0].problem)))
    assert found.decisions == 2
    assert np.isnan(found.losses()).all()


def test_churn_is_that_of_moves_after_the_first_decision(
    engine: StackedEpisodes, tasks: list[ProxyTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    apply = engine.apply

    def noted(slot: int, *wish: Any) -> Plan:
        plans.append(apply(slot, *wish))
        return plans[-1]

    with monkeypatch.context() as patch:
        patch.setattr(engine, "apply", noted)
        found, _ = play(engine, tasks[:1])
    first, second, third = (found.observations[0].problem.ladder.rung(plan.ranks) for plan in plans)
    assert found.churn == [pytest.approx(churn_cost(first, second) + churn_cost(second, third))]
    assert churn_cost(second, third) > 0


def test_the_first_plan_and_keeping_it_are_free(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    """But for the bytes of signal buffers, which the last plan may spend as well: here the unit is parameters."""
    quiet = Rollout(engine, [replace(tasks[0], unit="parameters")])
    count = engine.module_count
    quiet.step({0: (np.full(count, 64), np.zeros(count))})
    assert (quiet.observations[0].problem.ranks != 1).any()
    quiet.step({0: (quiet.observations[0].problem.ranks, np.zeros(count))})
    quiet.step({0: (quiet.observations[0].problem.ranks, np.zeros(count))})
    assert quiet.churn == [0.0]


def test_the_initial_loss_is_that_of_the_base(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    unknown = replace(tasks[0], reference=None)
    found = Rollout(engine, [tasks[1], unknown])
    losses = [found.initial_loss(slot) for slot in range(2)]
    assert losses[0] != losses[1]
    engine.measure_references({0: unknown})
    assert losses[1] == engine.reference(unknown).initial


def test_tasks_of_another_base_are_refused(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    with pytest.raises(ConfigError, match="share one base"):
        Rollout(engine, [replace(tasks[0], base="bert-4x32")])
