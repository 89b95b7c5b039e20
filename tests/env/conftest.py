"""Tiny proxy tasks on one corpus that loads in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rankpilot.env import corpora
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.env.tasks import ProxyTask

SIZES = {"steps": 12, "batch_size": 4, "length": 16, "eval_rows": 16}


@pytest.fixture(scope="session", autouse=True)
def _one_corpus() -> Iterator[None]:
    """Planted tasks that are drawn ask for documentation, which takes seven seconds to read: code stands in for it."""
    reader = corpora._READERS["documentation"]
    corpora._READERS["documentation"] = corpora._READERS["code"]
    corpora.load_corpus.cache_clear()
    yield
    corpora._READERS["documentation"] = reader
    corpora.load_corpus.cache_clear()


@pytest.fixture(scope="session")
def schedule() -> DecisionSchedule:
    return DecisionSchedule(probe_steps=4)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., ProxyTask]:
    def make(kind: Any = "shift", seed: int = 1, **options: Any) -> ProxyTask:
        return ProxyTask(kind, seed, **{**SIZES, **options})

    return make
