"""Tiny proxy tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.env.tasks import ProxyTask

SIZES = {"steps": 12, "batch_size": 4, "length": 16, "eval_rows": 16}


@pytest.fixture(scope="session")
def schedule() -> DecisionSchedule:
    return DecisionSchedule(probe_steps=4)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., ProxyTask]:
    def make(kind: Any = "shift", seed: int = 1, **options: Any) -> ProxyTask:
        return ProxyTask(kind, seed, **{**SIZES, **options})

    return make
