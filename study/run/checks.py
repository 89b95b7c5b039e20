"""What a run's folder tells, checked before it is shown: the folder may be a stranger's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import shown

MOST_NUMBER = 2**53
"""The largest whole number that is read; all below are exact as floating-point numbers."""

_NUMBERS = (
    "held_out_loss",
    "held_out_accuracy",
    "adapter_parameters",
    "peak_bytes",
    "budget_bytes",
    "median_step_s",
    "train_s",
    "steps",
    "energy_joules",
)
"""Results of a run that are numbers, or unknown."""

_SETUP = ("seed", "held_out_rows", "largest_class", "outputs", "steps")
"""What a summary tells as numbers beside them."""


def number_rows(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """The numbers of each line of metrics by name, and its times of steps; lines of something else are left out."""
    objects = [line for line in lines if isinstance(line, dict)]
    rows = [{key: value for key, value in line.items() if _belongs(key, value)} for line in objects]
    return [row for row in rows if is_number(row.get("step", 0)) and row.get("step", 0) >= 0]


def check_summary(summary: Any) -> None:
    """Refuse a summary whose values are not those of a run.

    Raises:
        TypeError, KeyError, AttributeError: something is of another type, or missing.
    """
    for name, run in summary["runs"].items():
        _check_numbers(run, _NUMBERS, f"{shown(name)}: ")
        hardware = run.get("hardware") or {}
        _check_numbers(hardware, ("busy", "free_bytes", "total_bytes"), f"{shown(name)}: ")
        for text in (hardware.get("device"), run.get("energy_source")):
            if not isinstance(text, str | None):
                raise TypeError(f"{shown(name)} has a name of hardware that is {shown(text)}")
        ranks = run.get("ranks") or {}
        if not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise TypeError(f"{shown(name)} has a rank that is none")
    _check_numbers(summary, _SETUP, "")
    if not (summary.get("largest_class") or 0) <= 1:
        raise TypeError(f"largest_class is {summary['largest_class']}, not a share")
    for name in ("model", "data", "policy"):
        if not isinstance(summary.get(name), str | None):
            raise TypeError(f"{name} is {shown(summary[name])}")


def is_number(value: Any) -> bool:
    """Whether a value is a number, of a size that floating-point numbers have; NaN and infinity are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= MOST_NUMBER


def _belongs(key: str, value: Any) -> bool:
    if key == "step_s":
        return isinstance(value, list) and all(map(is_number, value))
    return is_number(value)


def _check_numbers(values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        value = values.get(name)
        if value is not None and (not is_number(value) or value < 0):
            raise TypeError(f"{where}{name} is {shown(value)}")
