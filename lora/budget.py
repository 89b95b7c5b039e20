"""Budgets as people write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..errors import BudgetError

_UNITS = {"b": 1}
for _index, _prefix in enumerate("kmgt", start=1):
    _UNITS |= {f"{_prefix}b": 1000**_index, f"{_prefix}ib": 1024**_index}

_FORMS = "'6GiB', '350MB', a number of bytes, '80%' (of the uniform run's bytes) or '300k params'"


@dataclass(frozen=True)
class Budget:
    """A hard limit for a plan.

    Attributes:
        kind: "bytes" at the peak of a training step; "share" of what uniform rank 8 on all target modules takes at
            that peak; "parameters" in the adapter, for comparisons with the literature.
        value: the limit, > 0, in the unit of `kind`.
    """

    kind: Literal["bytes", "share", "parameters"]
    value: float

    @classmethod
    def parse(cls, given: Budget | str | float) -> Budget:
        """Read a budget.

        Args:
            given: "6GiB", "350MB" or an int above 1 (bytes), "80%" or a float up to 4 (share), "300k params".

        Raises:
            BudgetError: it is unreadable, zero, negative or not finite.
        """
        if isinstance(given, Budget):
            return given
        text = str(given).strip().lower().replace(",", "").replace("_", "")
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(%|[kmgt]?i?b|[kmb]?\s*param(?:eter)?s)?", text)
        try:
            number = float(match.group(1)) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not math.isfinite(number) or number <= 0:
            raise BudgetError(f"Cannot read the budget {given!r}. Allowed: {_FORMS}, all above zero.")
        unit = match.group(2)
        if unit == "%":
            return cls("share", number / 100)
        if unit and unit.endswith(("params", "parameters")):
            return cls("parameters", number * {"k": 1e3, "m": 1e6, "b": 1e9}.get(unit[0], 1))
        if unit:
            return cls("bytes", number * _UNITS[unit])
        if isinstance(given, float) or "." in text:
            if number <= 4:
                return cls("share", number)
            raise BudgetError(
                f"The budget {given!r} is neither a share nor a whole number of bytes. Allowed: {_FORMS}."
            )
        return cls("bytes", number)


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
