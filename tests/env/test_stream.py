"""Which task each episode has: draws, fresh seeds and the options of reset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from rankpilot.env.proxy_task import FRESH_SEEDS, ProxyTask, Reference, TaskStream, fresh_task

MakeTask = Callable[..., ProxyTask]


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
