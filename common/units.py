"""Numbers with units, for people."""

from __future__ import annotations

import math

_UNITS = ("B", "KiB", "MiB", "GiB")


def format_bytes(count: float, *, up: bool = False) -> str:
    """A byte count for people, in binary units: 1536 -> '1.5 KiB'; rounded to four digits, upwards if asked."""
    unit, size = byte_unit(count)
    count /= size
    if up and count > 0:
        last_digit = 10.0 ** (0 if unit == "B" else math.floor(math.log10(count)) - 3)
        count = math.ceil(count / last_digit) * last_digit
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"


def byte_unit(count: float) -> tuple[str, int]:
    """The binary unit in which people write a byte count, and its bytes: 3000 -> ('KiB', 1024)."""
    power = sum(abs(count) >= 1024**step for step in range(1, len(_UNITS)))
    return _UNITS[power], 1024**power


def cost_text(cost: float, unit: str) -> str:
    """A cost with its unit: "96.5 MiB", "120,000 parameters"."""
    return format_bytes(cost) if unit == "bytes" else f"{cost:,.0f} parameters"


def plural(count: int, word: str) -> str:
    """A count with its word: "1 run", "2 runs"."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def three_digits(value: float) -> str:
    """A number with three digits, or with all of those before the point: 0.123, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def part_of(count: float, limit: float, unit: str) -> str:
    """A cost beside its limit, with the unit once: '12.1 of 12.3 GiB', '240,000 of 300,000 parameters'."""
    if unit != "bytes":
        return f"{count:,.0f} of {limit:,.0f} {unit}"
    name, size = byte_unit(limit)
    return f"{three_digits(count / size)} of {three_digits(limit / size)} {name}"
