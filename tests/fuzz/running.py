"""Runs a reader on damaged input: it may refuse it by an error of rankpilot, and must not fail, hang or take memory.

A few examples of each run with all tests, always the same ones. `make fuzz MINUTES=10` runs new ones for ten minutes a
target.
"""

from __future__ import annotations

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from rankpilot.common.errors import RankPilotError

MINUTES = "RANKPILOT_FUZZ_MINUTES"
"""Environment variable: how long each target runs."""

MOST_SECONDS = 30
"""An input that takes longer counts as a hang. What is read here is small: it takes milliseconds."""

MOST_BYTES = 3 * 2**30
"""Address space that reading one input may take."""

MOST_WORDS = 5000
"""Characters of an error, at most."""

EXAMPLES_A_ROUND = 300

Check = Callable[[Any], None]


def fuzz(inputs: SearchStrategy[Any], *, examples: int) -> Callable[[Check], Callable[[], None]]:
    """A test from a function that reads one input.

    Args:
        inputs: damaged and whole ones.
        examples: how many with all tests.
    """

    def decorate(check: Check) -> Callable[[], None]:
        def survived(value: Any) -> None:
            refusal = None
            try:
                with _bounded():
                    check(value)
            except RankPilotError as error:
                refusal = str(error)
            assert refusal is None or 0 < len(refusal) < MOST_WORDS, "an error of no words, or of all of the input"

        def test() -> None:
            options: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
            options["phases"] = [phase for phase in Phase if phase is not Phase.explain]
            minutes = float(os.environ.get(MINUTES, "0"))
            if not minutes:
                few = settings(max_examples=examples, derandomize=True, **options)
                few(given(inputs)(survived))()
                return
            end, done = time.monotonic() + 60 * minutes, 0
            for number in count(int(time.time())):
                many = settings(max_examples=EXAMPLES_A_ROUND, derandomize=False, **options)
                many(seed(number)(given(inputs)(survived)))()
                done += EXAMPLES_A_ROUND
                if time.monotonic() > end:
                    break
            print(f"{check.__name__}: {done:,} inputs")

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return pytest.mark.fuzz(test)

    return decorate


@contextmanager
def _bounded() -> Iterator[None]:
    """Let the block take so much time and memory, and pass over what numpy warns of in damaged numbers."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"reading took more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MOST_BYTES, hard))
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
