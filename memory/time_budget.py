"""Limits of the time of a training step, as people write them.

Settings read them, so this module imports no torch, and numpy only where it needs it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import BudgetError, shown
from ..lora.ladder import REFERENCE_RANK
from .budget import MOST_SHARE, budget_text

if TYPE_CHECKING:
    from ..common.arrays import IntArray
    from .step_time import StepTime

_FORMS = "'75%' (of a step of plain LoRA, rank 8 on all target modules, no layer run again), '0.8s' or '800ms' a step"

_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}


@dataclass(frozen=True)
class TimeBudget:
    """The limit of a step's time as its user gave it; `resolve` makes seconds of it.

    Attributes:
        kind: "share" of what a step takes with rank 8 on all target modules where no layer runs again; "seconds".
        value: above 0.
    """

    kind: Literal["share", "seconds"]
    value: float

    @classmethod
    def parse(cls, given: TimeBudget | str) -> TimeBudget:
        """Read a limit: "75%", "0.8s", "800ms", "1.5min".

        Raises:
            BudgetError: it is unreadable, has no unit, or is not above zero and finite.
        """
        if isinstance(given, TimeBudget):
            return given
        match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%|ms|s|min)?", budget_text(given))
        number = float(match.group(1)) if match else math.nan
        unit = match.group(2) if match else None
        value = number / 100 if unit == "%" else number * _SECONDS[unit or "s"]
        if not (math.isfinite(value) and value > 0):
            raise BudgetError(f"Cannot read the time {shown(given)}. Allowed: {_FORMS}, all above zero.")
        if unit is None:
            share = f" or '{100 * number:g}%'" if number <= MOST_SHARE else ""
            raise BudgetError(f"The time {given!r} has no unit. Write '{number:g}s'{share}. Allowed: {_FORMS}.")
        return cls("share" if unit == "%" else "seconds", value)

    @classmethod
    def unlimited(cls) -> TimeBudget:
        """A limit that no plan reaches, for runs whose steps are timed to tell plans apart."""
        return cls("share", 64.0)

    def __str__(self) -> str:
        """The limit in a form that `parse` reads."""
        return f"{100 * self.value:g}%" if self.kind == "share" else f"{self.value:g}s"

    def resolve(self, time: StepTime, max_ranks: IntArray) -> float:
        """The seconds that a step may take.

        Args:
            time: of a step under any plan.
            max_ranks: the highest rank of each module, int64 (modules,).
        """
        return self.value * reference_seconds(time, max_ranks) if self.kind == "share" else self.value


def reference_seconds(time: StepTime, max_ranks: IntArray) -> float:
    """The seconds of plain LoRA: rank 8 on every module, or its highest in `max_ranks`, and no layer runs again."""
    import numpy as np

    return time.seconds(np.minimum(REFERENCE_RANK, max_ranks), ())
