"""Convert options of `attach` between the command line, the processes of a program, and Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decide.settings import DecisionSchedule
from ..finetune.options import rank_bounds_of


def attach_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options from the command line's form to that of `attach`.

    Raises:
        ConfigError: a bound or a schedule is not valid.
    """
    options = dict(given)
    if "bounds" in options:
        options["bounds"] = rank_bounds_of(tuple(options["bounds"]))
    if "schedule" in options:
        options["schedule"] = DecisionSchedule(fractions=tuple(options["schedule"]))
    return options


def in_words(given: Mapping[str, Any]) -> str:
    """Describe options as flags, such as "--budget 80%"."""
    words = (f"--{name.replace('_', '-')} {_shown(value)}" for name, value in given.items())
    return " ".join(words) or "default options"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
