"""Which task each episode has: draws, fresh seeds and the options of reset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rankpilot.env.proxy_task import FRESH_SEEDS, ProxyTask, Reference, TaskStream, fresh_task
from rankpilot.errors import ConfigError

MakeTask = Callable[..., ProxyTask]


def test_draws_are_even_and_follow_the_seed(make_task: MakeTask) -> None:
    tasks = [make_task(seed=seed) for seed in range(5)]

    def draw(count: int, seed: int = 0) -> list[int]:
        stream = TaskStream(tasks, np.random.default_rng(seed))
        return [stream.take().seed for _ in range(count)]

    plain = draw(50)
    assert draw(50) == plain != draw(50, seed=1)
    assert set(plain) == set(range(5))


def test_fresh_tasks_differ_in_the_seed_alone(make_task: MakeTask) -> None:
    template = make_task("planted", 7, reference=Reference(3.0, 2.0, 1.5))
    stream = TaskStream([template], np.random.default_rng(0), fresh_seeds=True)
    drawn = [stream.take() for _ in range(20)]
    assert len({task.seed for task in drawn}) == 20
    for task in drawn:
        assert isinstance(task, ProxyTask)
        assert task.seed >= FRESH_SEEDS
        assert replace(task, seed=7) == template
    assert fresh_task(template, np.random.default_rng(3)) == fresh_task(template, np.random.default_rng(3))


def test_options_of_reset(make_task: MakeTask) -> None:
    tasks = [make_task(seed=seed, reference=Reference(3.0, 2.0)) for seed in range(5)]
    one, two = (TaskStream(tasks, np.random.default_rng(0), fresh_seeds=True) for _ in range(2))
    assert one.take({"task": tasks[3]}) is tasks[3]
    tight = one.take({"budget": 0.5})
    drawn = two.take()
    assert isinstance(drawn, ProxyTask)
    assert tight == replace(drawn, budget=0.5, reference=None), "a given task draws none"
    with pytest.raises(ConfigError, match=r"Options of reset are 'task' and 'budget'; got \['bugdet'\]"):
        one.take({"bugdet": 0.5})
    assert one.take({"task": tasks[0], "budget": np.float32(0.5)}) == replace(tasks[0], budget=0.5, reference=None)
    for given in (0, "", False):
        with pytest.raises(ConfigError, match=f"task is a ProxyTask or an OwnTask; got {given!r}"):
            one.take({"task": given})
    with pytest.raises(ConfigError, match=r"a share of what rank 8 on all modules takes, such as 0\.5; got True"):
        one.take({"budget": True})
