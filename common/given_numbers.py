"""Single numbers that a caller passes: whether they are of the right kind and in range."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def is_count(value: object) -> bool:
    """Whether it is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_real(value: object) -> bool:
    """Whether it is a number, of Python or of NumPy."""
    return not isinstance(value, bool) and isinstance(value, Real)


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0, of Python or of NumPy."""
    return is_real(value) and 0 < value < math.inf
