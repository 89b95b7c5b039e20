"""Single numbers of a file that may be damaged: of the right type and in range, or ValueError or TypeError."""

from __future__ import annotations

import math
from typing import Any

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
