"""One tiny interleaved run that several tests look at."""

from __future__ import annotations

import pytest

from benchmarks.models import Size
from benchmarks.overhead import Course

TINY = Size(layers=2, width=32, vocabulary=64, rows=4, length=8)
SHORT = Course(cycles=2)


@pytest.fixture(scope="session")
def tiny() -> Size:
    """A model that takes milliseconds a step."""
    return TINY


@pytest.fixture(scope="session")
def short() -> Course:
    """Two timed cycles."""
    return SHORT
