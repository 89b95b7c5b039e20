"""Parse budgets, and resolve them to limits.

Settings parse budgets, so this module imports torch only where needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..common.arrays import IntArray
from ..common.errors import BudgetError, ConfigError, first_line, shown
from ..common.text import cost_text, format_bytes, given_bytes
from ..lora.spec import REFERENCE_RANK
from .cost import Cost, CostUnit, plan_cost

if TYPE_CHECKING:
    import torch

_UNITS = {"b": 1, "bytes": 1}
for _index, _prefix in enumerate("kmgt", start=1):
    _UNITS |= {f"{_prefix}b": 1000**_index, f"{_prefix}ib": 1024**_index}

_FORMS = (
    "'24GiB', '350MB', a whole number of at least 1024 bytes (everything on the device, including "
    "the frozen model), '6GiB step' (a step on top of the frozen model), '80%' (of the memory that the "
    "adapter takes as configured), '300k params' or 'auto'"
)

AUTO_SHARE = 0.9
"""Share of the device's free memory used by "auto", and of the bytes a total budget leaves for a step on CUDA. The rest
covers fragmentation and operator workspaces.
"""

MOST_SHARE = 4
"""Highest accepted share: a larger number with a decimal point is refused."""

MOST_TEXT = 60
"""Longest accepted text of a budget, in characters."""

LEAST_BYTES = 1024
"""Smallest accepted number of bytes without a unit: a smaller whole number is refused."""


@dataclass(frozen=True)
class Limit:
    """Upper bound on the cost of a plan.

    Attributes:
        value: the limit, > 0, in `unit`.
        unit: unit of the limited cost.
        whole: the value of a share of 1.
    """

    value: float
    unit: CostUnit
    whole: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Budget:
    """A budget as given by the user; `resolve` turns it into a limit.

    Attributes:
        kind: "total" bytes of the device, including the frozen model; "bytes" at the peak of a training step, excluding
            it; "share" of the cost of the adapter as configured; "parameters" in the adapter, for comparisons with the
            literature; "auto": a share of the free memory on the model's device before training.
        value: above 0, in the unit of `kind`.
    """

    kind: Literal["bytes", "total", "share", "parameters", "auto"]
    value: float

    @classmethod
    def parse(cls, given: Budget | str | float) -> Budget:
        """Parse a budget.

        Args:
            given: "24GiB", "350MB" or a whole number from 1024 on (bytes of the device); "6GiB step"; "80%" or a number
                with a decimal point up to 4 (share): 1.0, "1.0" and "100%" are the full cost of the adapter as
                configured; "300k params"; "auto". A smaller whole number, such as 1 or "80", is refused as implausible.

        Raises:
            BudgetError: it is unreadable, zero, negative, not finite, or a whole number below 1024.
        """
        if isinstance(given, Budget):
            return given
        text = re.sub(r"(?<=[0-9])[,_](?=[0-9]{3}(?![0-9]))", "", budget_text(given))  # thousands separators
        if text == "auto":
            return cls("auto", AUTO_SHARE)
        of_bytes = r"bytes|(?:[kmgt]i?)?b"
        match = re.fullmatch(rf"([0-9.]+(?:e[0-9]+)?)\s*(%|{of_bytes}|[kmb]?\s*param(?:eter)?s)?", text)
        step = re.fullmatch(rf"(.*[0-9.]\s*(?:{of_bytes}))\s+step", text)
        if step:
            return cls("bytes", cls.parse(step.group(1)).value)
        unit = match.group(2) if match else None
        try:
            number = float(match.group(1)) if match else math.nan
        except ValueError:
            number = math.nan
        value = number / 100 if unit == "%" else number * _factor(unit)
        if not (math.isfinite(value) and number > 0 and value > 0):
            raise BudgetError(f"Cannot read the budget {shown(given)}. Allowed: {_FORMS}; all must be above zero.")
        if unit == "%":
            return cls("share", value)
        if unit and unit.endswith(("params", "parameters")):
            return cls("parameters", value)
        if unit:
            return cls("total", value)
        return cls._without_unit(given, number, whole=not (isinstance(given, float) or "." in text))

    @classmethod
    def _without_unit(cls, given: object, number: float, *, whole: bool) -> Budget:
        if not whole:
            if number <= MOST_SHARE:
                return cls("share", number)
            raise BudgetError(
                f"The budget {given!r} is neither a share nor a whole number of bytes. Allowed: {_FORMS}."
            )
        if number < LEAST_BYTES:
            percent = 100 if number == 1 else number
            meant = f'"{percent:.0f}%" or "{number:.0f}GiB"' if percent <= 100 * MOST_SHARE else f'"{number:.0f}MB"'
            raise BudgetError(
                f"The budget {given!r} would be {number:.0f} bytes, too few for any adapter. Did you mean "
                f"{meant}? Allowed: {_FORMS}."
            )
        return cls("total", number)

    def __str__(self) -> str:
        """Return the budget as text for `parse`."""
        if self.kind == "share":
            return f"{100 * self.value:g}%"
        if self.kind == "auto":
            return "auto"
        unit = {"parameters": "params", "bytes": "bytes step"}.get(self.kind, "bytes")
        return f"{self.value:.0f} {unit}"

    def told(self, limit: Limit) -> str:
        """Describe the resulting allowance in a sentence; `limit` is the resolved one."""
        allowed = given_bytes(limit.value) if self.kind == "bytes" else cost_text(limit.value, limit.unit)
        if self.kind == "parameters":
            return f"The budget is {allowed} in the adapter."
        if self.kind == "share":
            whole = cost_text(limit.value / self.value, limit.unit)
            return (
                f"The budget is {allowed} per step on top of the frozen model: {self} of the {whole} that the "
                "LoRA takes as configured."
            )
        if self.kind == "total":
            rest = format_bytes(self.value - limit.value, up=True)
            return (
                f"The total budget is {given_bytes(self.value)}: {allowed} per step, and {rest} for the frozen "
                "model, the device's context and the allocator's reserve."
            )
        free = ", nine tenths of the free memory" if self.kind == "auto" else ""
        return f"The budget is {allowed} per step on top of the frozen model{free}."

    @property
    def unit(self) -> CostUnit | None:
        """Unit of the costs it can limit; None for a share, which limits either."""
        if self.kind == "share":
            return None
        return "parameters" if self.kind == "parameters" else "bytes"

    @property
    def share(self) -> float | None:
        """Share of the cost of the adapter as configured; None for other kinds."""
        return self.value if self.kind == "share" else None

    def beside(self, resident: float, *, cuda: bool) -> Budget:
        """Return what a total budget leaves for a step, on CUDA without the allocator's overhead (`AUTO_SHARE`).

        Args:
            resident: bytes of the frozen model and whatever else no plan changes.
            cuda: True for a CUDA device.

        Raises:
            BudgetError: they already exhaust the budget.
        """
        if resident >= self.value:
            raise BudgetError(
                f"The total budget of {format_bytes(self.value)} is less than the frozen model and the device's "
                f"context take, {format_bytes(resident, up=True)}. Raise it, or load the model in lower precision "
                "(bf16, or quantised). For a step only, on top of the frozen model, write "
                f"'{format_bytes(self.value)} step'."
            )
        return Budget("bytes", (AUTO_SHARE if cuda else 1.0) * (self.value - resident))

    def resolve(
        self, cost: Cost, reference: IntArray, device: torch.device | None = None, kept: IntArray | None = None
    ) -> Limit:
        """Resolve the budget to a limit, in the unit of the cost.

        Args:
            cost: cost of a plan.
            reference: the ranks whose cost a share refers to, int64 (modules,): those of the adapter as it was passed.
            device: device of the model, if it is loaded; "auto" takes a share of its free memory.
            kept: ranks of trained adapters, int64 (modules,). A share refers to their cost if it is higher, so "100%"
                discards nothing already learned.

        Raises:
            BudgetError: the budget is in bytes and the cost in parameters, or the other way round.
        """
        if self.unit not in (None, cost.unit):
            given = "auto" if self.kind == "auto" else f"{self.value:,.0f} {self.unit}"
            form = "'300k params'" if cost.unit == "parameters" else "'24GiB', '6GiB step'"
            raise BudgetError(
                f"The budget is {given}, but plan costs are counted in {cost.unit}. Pass a budget in {cost.unit} "
                f"({form}) or a share ('80%'), or count costs in {self.unit}."
            )
        whole = max(plan_cost(cost, ranks) for ranks in (reference, kept) if ranks is not None)
        of = whole if self.kind == "share" else 1
        if self.kind == "auto":
            assert device is not None, "there is a device"
            of = free_bytes(device)
        return Limit(self.value * of, cost.unit, whole)


GivenBudget = str | float | Budget | Callable[[], str | float | Budget]
"""A budget as given by the user: see `Budget.parse`; or a function without arguments to return one."""


def budget_now(given: GivenBudget) -> Budget:
    """Return the given budget, calling it first if it is a function.

    Raises:
        BudgetError: it cannot be parsed.
        ConfigError: the function fails.
    """
    if not callable(given):
        return Budget.parse(given)
    try:
        found = given()
    except Exception as error:
        raise ConfigError(
            f"The budget function failed with {type(error).__name__}: {first_line(error)}. It must take no "
            "argument and return a budget such as '24GiB'."
        ) from error
    try:
        return Budget.parse(found)
    except BudgetError as error:
        raise BudgetError(f"The budget function returned {shown(found)}. {error}") from error


def budget_text(given: object) -> str:
    """Return a given budget as short lower-case text; empty if it is too long."""
    if isinstance(given, int) and abs(given) >= 10**MOST_TEXT:  # Python itself refuses to print some of these
        return ""
    text = str(given).strip().lower()
    return text if len(text) <= MOST_TEXT else ""


def _factor(unit: str | None) -> float:
    """Return the multiplier of a unit; the default is bytes."""
    if unit and unit.endswith(("params", "parameters")):
        return {"k": 1e3, "m": 1e6, "b": 1e9}.get(unit[0], 1.0)
    return _UNITS.get(unit or "b", 1)


def free_bytes(device: torch.device) -> int:
    """Return a device's free bytes: those of the CUDA driver and the allocator's cache, or of main memory.

    The limit of a control group (of a container) applies if it is lower.
    """
    import psutil
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    free = int(psutil.virtual_memory().available)
    limit, used = _of_group("memory.max"), _of_group("memory.current")
    return free if math.isinf(limit + used) else int(min(free, max(limit - used, 0)))


def _of_group(name: str) -> float:
    """Read a byte count of this process's control group; infinite if there is none or no limit ("max")."""
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return math.inf


def beyond_device(budget: Budget, device: torch.device) -> str:
    """Return a warning for a budget larger than the device; empty otherwise."""
    import psutil
    import torch

    cuda = device.type == "cuda"
    there = torch.cuda.mem_get_info(device)[1] if cuda else min(psutil.virtual_memory().total, _of_group("memory.max"))
    if budget.kind not in ("bytes", "total") or budget.value <= there:
        return ""
    what = "card" if cuda else "machine"
    return f"The budget exceeds this {what}'s memory, {format_bytes(there)}, so a step within it may run out of memory."


def reference_cost(cost: Cost, max_ranks: IntArray) -> float:
    """Return the cost of rank 8 on every module, capped at `max_ranks`, int64 (modules,)."""
    return plan_cost(cost, np.minimum(REFERENCE_RANK, max_ranks))
