"""Shorter tasks and a shorter probe, for tests that run many episodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.proxy_task import ProxyTask

MakeTask = Callable[..., ProxyTask]


@pytest.fixture(scope="session")
def make_task(make_task: MakeTask) -> MakeTask:
    """Tasks that are shorter still."""
    return partial(make_task, steps=8)


@pytest.fixture(scope="session")
def schedule() -> DecisionSchedule:
    return DecisionSchedule(probe_steps=2, fractions=(0.0, 0.25, 0.4, 0.6))
