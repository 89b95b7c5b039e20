"""Numbers with units, for people."""

from __future__ import annotations

import math


def format_bytes(count: float, *, up: bool = False) -> str:
    """A byte count for people, in binary units: 1536 -> '1.5 KiB'; rounded to four digits, upwards if asked."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            if up and count > 0:
                last_digit = 10.0 ** (0 if unit == "B" else math.floor(math.log10(count)) - 3)
                count = math.ceil(count / last_digit) * last_digit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
