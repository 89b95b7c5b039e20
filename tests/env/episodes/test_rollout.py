"""Rollouts: many episodes decision by decision, each as if it ran alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rankpilot.allocation.observation import Observation
from rankpilot.allocation.policy import Decision, decision_to_keep
from rankpilot.allocation.problem import AllocationProblem
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.env.episodes.rollout import Rollout, rollout
from rankpilot.env.episodes.stacked import StackedEpisodes
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


def decision(task: ProxyTask, turn: int, problem: AllocationProblem) -> Decision:
    generator, count = np.random.default_rng([task.seed, turn]), len(problem.ranks)
    return Decision(
        problem.ladder.step(problem.ranks, generator.integers(-10, 11, count)), generator.normal(size=count)
    )


def play(engine: StackedEpisodes, tasks: Sequence[ProxyTask]) -> tuple[Rollout, list[list[Any]]]:
    """A whole rollout of random decisions; also the ranks that were seen at each."""
    running, ranks = Rollout(engine, tasks), []

    def decide(seen: Sequence[Observation]) -> list[Decision]:
        ranks.append([observation.problem.ranks for observation in seen])
        return [decision(task, running.decisions, each.problem) for task, each in zip(tasks, seen, strict=True)]

    rollout(running, decide)
    return running, ranks


@pytest.fixture(scope="module")
def together(engine: StackedEpisodes, tasks: list[ProxyTask]) -> tuple[Rollout, list[list[Any]], list[float]]:
    played, ranks = play(engine, tasks)
    return played, ranks, played.losses()


def test_all_begin_and_end_together(together: tuple[Rollout, list[list[Any]], list[float]]) -> None:
    played, ranks, losses = together
    assert played.ended
    assert not played.active
    assert played.decisions == len(ranks) == 3
    assert [math.isfinite(loss) for loss in losses] == [True, True, False]


def test_an_episode_ends_as_if_alone(
    engine: StackedEpisodes, tasks: list[ProxyTask], together: tuple[Rollout, list[list[Any]], list[float]]
) -> None:
    """The failed one beside it included."""
    alone = []
    for task in tasks[:2]:
        played, _ = play(engine, [task])
        alone += played.losses()
    assert alone == together[2][:2]


def test_a_failed_episode_sits_out(together: tuple[Rollout, list[list[Any]], list[float]]) -> None:
    _, ranks, _ = together
    assert (ranks[1][2] == ranks[2][2]).all(), "what is seen of it stays as it was"
    assert (ranks[1][0] != ranks[2][0]).any()


def test_a_round_of_failures_ends(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    played = Rollout(engine, [tasks[2], tasks[2]])
    played.step([decision(tasks[2], 0, played.seen[0].problem)] * 2)
    assert played.ended
    assert played.decided == [0, 1]
    played.step([decision(tasks[2], 1, played.seen[0].problem)] * 2)
    assert played.decided == []
    assert played.decisions == 2
    assert np.isnan(played.losses()).all()


def test_the_initial_loss_is_that_of_the_base(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    unknown = replace(tasks[0], reference=None)
    played = Rollout(engine, [tasks[1], unknown])
    losses = [played.initial_loss(slot) for slot in range(2)]
    assert losses[0] != losses[1]
    engine.measure_references({0: unknown})
    assert losses[1] == engine.reference(unknown).initial


def test_tasks_of_another_base_are_refused(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    with pytest.raises(ConfigError, match="share one base"):
        Rollout(engine, [replace(tasks[0], base="bert-4x32")])


def test_what_is_noted_is_what_was_seen_and_decided(engine: StackedEpisodes, tasks: list[ProxyTask]) -> None:
    running = Rollout(engine, tasks)
    noted: list[tuple[Any, Any, list[int], list[list[int]]]] = []

    def note(seen: Any, chosen: Any) -> None:
        noted.append((seen, chosen, running.decided, [ranks.tolist() for ranks in running.ranks]))

    rollout(running, lambda seen: [decision_to_keep(observation) for observation in seen], note)
    assert [slots for _, _, slots, _ in noted] == [[0, 1, 2], [0, 1], [0, 1]]
    for (_, _, _, ranks), (seen, chosen, _, _) in itertools.pairwise(noted):
        assert [observation.problem.ranks.tolist() for observation in seen][:2] == ranks[:2]
        assert len(chosen) == 3
