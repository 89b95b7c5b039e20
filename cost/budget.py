"""Budgets of bytes and of seconds as people write them, and the limits that they set.

Settings read budgets, so this module imports torch only where it needs it.
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
from ..common.text import cost_text, format_bytes, given_bytes
from ..errors import BudgetError, ConfigError, first_line, shown
from ..lora.spec import REFERENCE_RANK
from .cost import Cost, CostUnit, plan_cost
from .step_time import StepTime

if TYPE_CHECKING:
    import torch

_UNITS = {"b": 1, "bytes": 1}
for _index, _prefix in enumerate("kmgt", start=1):
    _UNITS |= {f"{_prefix}b": 1000**_index, f"{_prefix}ib": 1024**_index}

_FORMS = (
    "'24GiB', '350MB', a whole number of bytes from 1024 on (all that the device holds, the frozen model included), "
    "'6GiB step' (a step beside the frozen model), '80%' (of what plain LoRA takes, rank 8 on all modules), "
    "'300k params' or 'auto'"
)

AUTO_SHARE = 0.9
"""The share of a device's free memory that "auto" takes, and of what bytes in all leave for a step on CUDA. The rest is
for fragments, and for workspaces of operators."""

MOST_SHARE = 4
"""The highest share that is read: a number with a decimal point above it is refused."""

MOST_TEXT = 60
"""Characters of a budget's text, at most."""

LEAST_BYTES = 1024
"""The lowest number of bytes that is read without a unit: a smaller whole number is refused."""


@dataclass(frozen=True)
class Limit:
    """What a plan may cost at most.

    Attributes:
        value: the limit, > 0, in `unit`.
        unit: the unit of the cost that it limits.
        whole: what a share of 1 would be.
    """

    value: float
    unit: CostUnit
    whole: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Budget:
    """A budget as its user gave it; `resolve` makes a limit of it.

    Attributes:
        kind: "total" bytes of the device, the frozen model included; "bytes" at the peak of a training step beside it;
            "share" of what plain LoRA costs (rank 8 on all modules); "parameters" in the adapter, for comparisons with
            the literature; "auto": a share of the memory that is free on the model's device before training.
        value: above 0, in the unit of `kind`.
    """

    kind: Literal["bytes", "total", "share", "parameters", "auto"]
    value: float

    @classmethod
    def parse(cls, given: Budget | str | float) -> Budget:
        """Read a budget.

        Args:
            given: "24GiB", "350MB" or a whole number from 1024 on (bytes of the device); "6GiB step"; "80%" or a number
                with a decimal point up to 4 (share): 1.0 and "1.0" are all that plain LoRA takes, and so is "100%";
                "300k params"; "auto". A smaller whole number, such as 1 or "80", is refused: nobody means so few bytes.

        Raises:
            BudgetError: it is unreadable, zero, negative, not finite, or a whole number below 1024.
        """
        if isinstance(given, Budget):
            return given
        text = re.sub(r"(?<=[0-9])[,_](?=[0-9]{3}(?![0-9]))", "", budget_text(given))  # between thousands
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
            raise BudgetError(f"Cannot read the budget {shown(given)}. Allowed: {_FORMS}, all above zero.")
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
                f"The budget {given!r} would be {number:.0f} bytes, too few for any adapter. Did you mean {meant}? "
                f"Allowed: {_FORMS}."
            )
        return cls("total", number)

    def __str__(self) -> str:
        """The budget in a form that `parse` reads."""
        if self.kind == "share":
            return f"{100 * self.value:g}%"
        if self.kind == "auto":
            return "auto"
        unit = {"parameters": "params", "bytes": "bytes step"}.get(self.kind, "bytes")
        return f"{self.value:.0f} {unit}"

    def told(self, limit: Limit, *, kept: bool = False) -> str:
        """What it allows, in a sentence.

        Args:
            limit: that it led to.
            kept: whether adapters are trained already, so that a share may be one of what they take.
        """
        allowed = given_bytes(limit.value) if self.kind == "bytes" else cost_text(limit.value, limit.unit)
        if self.kind == "parameters":
            return f"The budget is {allowed} of the adapter."
        if self.kind == "share":
            whole = cost_text(limit.value / self.value, limit.unit)
            what = "plain LoRA or the trained ranks take" if kept else "plain LoRA takes, rank 8 on all modules"
            return f"The budget is {allowed} for a step beside the frozen model: {self} of {whole}, which {what}."
        if self.kind == "total":
            rest = format_bytes(self.value - limit.value, up=True)
            return (
                f"The budget is {given_bytes(self.value)} in all: {allowed} for a step, and {rest} for the frozen "
                "model, the device's context and what the allocator reserves."
            )
        free = ", nine tenths of what is free" if self.kind == "auto" else ""
        return f"The budget is {allowed} for a step beside the frozen model{free}."

    @property
    def unit(self) -> CostUnit | None:
        """The unit of the costs that it can limit; None for a share, which limits either."""
        if self.kind == "share":
            return None
        return "parameters" if self.kind == "parameters" else "bytes"

    @property
    def share(self) -> float | None:
        """The share of what plain LoRA costs; None of another kind."""
        return self.value if self.kind == "share" else None

    def resolve(self, cost: Cost, max_ranks: IntArray, device: torch.device, kept: IntArray | None = None) -> Limit:
        """The limit of plans, in the unit of their cost.

        Args:
            cost: of a plan.
            max_ranks: the highest rank that each module can have, int64 (modules,).
            device: of the model; "auto" takes a share of its free memory.
            kept: ranks of adapters that are trained already, int64 (modules,). A share is one of what they take if
                that is more than plain LoRA takes: so "100%" takes nothing away that was learned.

        Raises:
            BudgetError: the budget is of bytes and the cost counts parameters, or the other way round.
        """
        if self.unit not in (None, cost.unit):
            given = "auto" if self.kind == "auto" else f"{self.value:,.0f} {self.unit}"
            form = "'300k params'" if cost.unit == "parameters" else "'24GiB', '6GiB step'"
            raise BudgetError(
                f"The budget is {given}, and the cost of a plan counts {cost.unit}. Give a budget of {cost.unit} "
                f"({form}) or a share ('80%'), or let the cost count {self.unit}."
            )
        whole = reference_cost(cost, max_ranks)
        if kept is not None:
            whole = max(whole, plan_cost(cost, kept))
        of = whole if self.kind == "share" else free_bytes(device) if self.kind == "auto" else 1
        return Limit(self.value * of, cost.unit, whole)


GivenBudget = str | float | Budget | Callable[[], str | float | Budget]
"""A budget as its user gives it: see `Budget.parse`, or a function without arguments that returns one."""


def budget_now(given: GivenBudget) -> Budget:
    """The budget that was given, or the one that a function gives at this moment.

    Raises:
        BudgetError: it cannot be read.
        ConfigError: the function fails.
    """
    if not callable(given):
        return Budget.parse(given)
    try:
        found = given()
    except Exception as error:
        raise ConfigError(
            f"The function that was given as budget failed with {type(error).__name__}: {first_line(error)}. It takes "
            "no argument, and returns a budget such as '24GiB'."
        ) from error
    try:
        return Budget.parse(found)
    except BudgetError as error:
        raise BudgetError(f"The function that was given as budget returned {shown(found)}. {error}") from error


def budget_text(given: object) -> str:
    """What was given as a budget, as a short text in lower case; empty if it is too long for one."""
    if isinstance(given, int) and abs(given) >= 10**MOST_TEXT:  # Python itself refuses to write some of these out
        return ""
    text = str(given).strip().lower()
    return text if len(text) <= MOST_TEXT else ""


def _factor(unit: str | None) -> float:
    """By what a number with this unit is multiplied; bytes without one."""
    if unit and unit.endswith(("params", "parameters")):
        return {"k": 1e3, "m": 1e6, "b": 1e9}.get(unit[0], 1.0)
    return _UNITS.get(unit or "b", 1)


def free_bytes(device: torch.device) -> int:
    """The free bytes of a device: on CUDA those of the driver and of the allocator's cache, else those of main memory.

    The limit of a control group (of a container) counts if it is lower.
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
    """Bytes that the control group of this process tells; infinite where there is none, or no limit ("max")."""
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return math.inf


def beyond_device(budget: Budget, device: torch.device) -> str:
    """What is to be told of a budget of more bytes than the device has; empty otherwise."""
    import psutil
    import torch

    cuda = device.type == "cuda"
    there = torch.cuda.mem_get_info(device)[1] if cuda else min(psutil.virtual_memory().total, _of_group("memory.max"))
    if budget.kind not in ("bytes", "total") or budget.value <= there:
        return ""
    what = "card" if cuda else "machine"
    return f"The budget is more than this {what} has, {format_bytes(there)}: a step inside it may run out of memory."


def reference_cost(cost: Cost, max_ranks: IntArray) -> float:
    """What rank 8 on every module costs, or a module's highest in `max_ranks`, int64 (modules,), if lower."""
    return plan_cost(cost, np.minimum(REFERENCE_RANK, max_ranks))


_TIME_FORMS = (
    "'75%' (of a step of plain LoRA, rank 8 on all target modules, no checkpointing), '0.8s' or '800ms' a step"
)

_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}


@dataclass(frozen=True)
class TimeBudget:
    """The limit of a step's time as its user gave it; `resolve` makes seconds of it.

    Attributes:
        kind: "share" of what a step takes with rank 8 on all target modules where no layer is checkpointed; "seconds".
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
            raise BudgetError(f"Cannot read the time {shown(given)}. Allowed: {_TIME_FORMS}, all above zero.")
        if unit is None:
            share = f" or '{100 * number:g}%'" if number <= MOST_SHARE else ""
            raise BudgetError(f"The time {given!r} has no unit. Write '{number:g}s'{share}. Allowed: {_TIME_FORMS}.")
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
    """The seconds of plain LoRA: rank 8 on every module, or its highest in `max_ranks`, and no checkpointing."""
    return time.seconds(np.minimum(REFERENCE_RANK, max_ranks), ())
