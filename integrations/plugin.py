"""Shared by the plugins of other trainers: check their options, and attach when a Trainer trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..common.errors import ConfigError, shown
from .hook import prepared, tell
from .order import Order


def checked_options(given: Any) -> dict[str, Any]:
    """Return options of `attach` from a plugin's settings, in the command line's form.

    Args:
        given: options by name, as in Python: bounds as a mapping, schedule as a list of fractions. None for none.

    Raises:
        ConfigError, UnknownNameError, BudgetError, PolicyFileError: an option is unknown, or its value is not valid.
    """
    from ..agents.policy_file import load_policy
    from ..finetune.options import PilotOptions
    from .flags import attach_options

    if not isinstance(given, Mapping | None):
        raise ConfigError(f'rankpilot takes options by name, such as {{budget: "80%"}}; got {shown(given)}.')
    options = {name: value for name, value in (given or {}).items() if value is not None}
    if isinstance(bounds := options.get("bounds"), Mapping):
        options["bounds"] = [f"{name}={_bound(bound)}" for name, bound in bounds.items()]
    try:
        PilotOptions.of(None, {name: value for name, value in attach_options(options).items() if name != "policy"})
    except (TypeError, AttributeError) as error:  # a value of another kind than its option
        raise ConfigError(f"rankpilot cannot read its options {shown(options)}: {error}") from error
    if "policy" in options:
        load_policy(options["policy"])
    return options


def _bound(given: Any) -> str:
    """Format a bound as text: 8, or 0:4 for a minimum and a maximum rank."""
    return ":".join(map(str, given)) if isinstance(given, list | tuple) else str(given)


def attach_when_it_trains(trainer: Any, options: Mapping[str, Any]) -> None:
    """Attach to a Trainer when its `train` is called; until then other plugins may change it.

    As under `rankpilot run`, a Trainer without LoRA, or one that cannot be attached to, trains as it is, with one line
    on standard error.

    Args:
        trainer: just made.
        options: from `checked_options`.
    """
    own, run, order = vars(trainer), trainer.train, Order(os.devnull, dict(options))

    def train(*arguments: Any, **named: Any) -> Any:
        if own.get("train") is train:
            own["train"] = run
            try:
                own["train"] = prepared(trainer, run, order) or run
            except Exception as error:  # libraries of other versions
                tell(f"{type(trainer).__name__} trains as it is, without rankpilot: {type(error).__name__}: {error}")
        return own["train"](*arguments, **named)

    own["train"] = train
