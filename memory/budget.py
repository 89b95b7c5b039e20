"""Budgets as people write them. Settings read budgets, so this module imports torch only where it measures."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import BudgetError

if TYPE_CHECKING:
    import torch

    from ..common.arrays import IntArray
    from .cost import Cost

_UNITS = {"b": 1}
for _index, _prefix in enumerate("kmgt", start=1):
    _UNITS |= {f"{_prefix}b": 1000**_index, f"{_prefix}ib": 1024**_index}

_FORMS = "'6GiB', '350MB', a number of bytes, '80%' (of the uniform run's bytes), '300k params' or 'auto'"

AUTO_SHARE = 0.9
"""Of the free memory of a device, what "auto" takes; the rest is for fragments and for what operators need inside."""


@dataclass(frozen=True)
class Budget:
    """A hard limit for a plan.

    Attributes:
        kind: "bytes" at the peak of a training step; "share" of what uniform rank 8 on all target modules takes at
            that peak; "parameters" in the adapter, for comparisons with the literature; "auto": a share of the memory
            that is free on the model's device before training.
        value: the limit, > 0, in the unit of `kind`.
    """

    kind: Literal["bytes", "share", "parameters", "auto"]
    value: float

    @classmethod
    def parse(cls, given: Budget | str | float) -> Budget:
        """Read a budget.

        Args:
            given: "6GiB", "350MB" or an int above 1 (bytes), "80%" or a float up to 4 (share), "300k params", "auto".

        Raises:
            BudgetError: it is unreadable, zero, negative or not finite.
        """
        if isinstance(given, Budget):
            return given
        text = str(given).strip().lower().replace(",", "").replace("_", "")
        if text == "auto":
            return cls("auto", AUTO_SHARE)
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

    def on(self, device: torch.device) -> Budget:
        """The same as a number of bytes, if it depends on the free memory of a device; otherwise unchanged."""
        return Budget("bytes", self.value * free_bytes(device)) if self.kind == "auto" else self


def free_bytes(device: torch.device) -> int:
    """Bytes that a device has left: on CUDA what the driver and the allocator's cache have, else main memory.

    A control group's limit (a container's) counts where it is lower.
    """
    import psutil
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free
    return min(free, max(limit - used, 0))


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


REFERENCE_RANK = 8
"""Budgets given as a share are shares of what this rank on every target module takes."""


def budget_limit(budget: Budget, cost: Cost, max_ranks: IntArray) -> float:
    """The limit of a plan in the unit of its cost: a share becomes that share of uniform rank 8's price."""
    if budget.kind == "share":
        return budget.value * reference_cost(cost, max_ranks)
    return budget.value


def reference_cost(cost: Cost, max_ranks: IntArray) -> float:
    """What uniform rank 8 on every module costs."""
    import numpy as np

    from .cost import total_cost

    return total_cost(cost, np.minimum(REFERENCE_RANK, max_ranks))
