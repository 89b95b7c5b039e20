"""Tiny tasks, and one thread for products that are the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rankpilot.env.tasks import FineTuneTask

SIZES = {"base": "llama-4x32", "steps": 25, "batch_size": 4, "length": 16, "eval_rows": 16}


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Every test of the environment."""


@pytest.fixture(scope="session")
def make_task() -> Callable[..., FineTuneTask]:
    def make(kind: Any = "text", seed: int = 1, **options: Any) -> FineTuneTask:
        return FineTuneTask(kind, seed, **{**SIZES, **options})

    return make
