"""Whether a single number is of the right kind and in range.

The first three functions answer for numbers that a caller passes. `finite` and `counted` read a number of a file that
may be damaged, and raise ValueError or TypeError.
"""

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


MOST_NUMBER = 2**53
"""The largest whole number that is read of a run; all below are exact as floating-point numbers."""


def is_moderate(value: object) -> bool:
    """Whether neither a value nor an item of a list is a whole number beyond `MOST_NUMBER`."""
    if isinstance(value, list):
        return all(map(is_moderate, value))
    return not isinstance(value, int) or abs(value) <= MOST_NUMBER


MOST = 2**63 - 1
"""The largest whole number that is taken."""


def finite(value: Any) -> float:
    """A finite number."""
    number = float(value)
    if isinstance(value, str) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return number


def counted(value: Any, least: int = 0) -> int:
    """A whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{value!r} is no whole number from {least} on")
    return value
