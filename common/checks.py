"""Type and range checks for single numbers.

The first three functions check a caller's arguments. `finite` and `counted` read a number from a possibly damaged file,
and raise ValueError or TypeError.
"""

import math
from numbers import Real
from typing import Any


def is_count(value: object) -> bool:
    """True for an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_real(value: object) -> bool:
    """True for a number, of Python or of NumPy."""
    return not isinstance(value, bool) and isinstance(value, Real)


def is_positive(value: Any) -> bool:
    """True for a finite number above 0, of Python or of NumPy."""
    return is_real(value) and 0 < value < math.inf


MOST_NUMBER = 2**53
"""Largest integer accepted from a run; all smaller ones are exact in floating point."""


def is_moderate(value: object) -> bool:
    """True unless the value, or an item of a list, is an integer beyond `MOST_NUMBER`."""
    if isinstance(value, list):
        return all(map(is_moderate, value))
    return not isinstance(value, int) or abs(value) <= MOST_NUMBER


MOST = 2**63 - 1
"""Largest accepted integer."""


def finite(value: Any) -> float:
    """Return a finite number."""
    number = float(value)
    if isinstance(value, str) or not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def counted(value: Any, least: int = 0) -> int:
    """Return an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{value!r} is not a whole number of at least {least}")
    return value
