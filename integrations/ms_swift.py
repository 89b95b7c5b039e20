"""The ms-swift plugin: keeps a run within a budget. A file such as rankpilot_plugin.py, with

    from rankpilot.integrations.ms_swift import register

    register(budget="80%")

goes into the settings:

    external_plugins: [rankpilot_plugin.py]
    callbacks: [rankpilot]
"""

from __future__ import annotations

import atexit
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map

from .hook import tell
from .plugin import attach_when_it_trains, checked_options

NAME = "rankpilot"
"""Name of the callback in ms-swift's settings."""


class RankpilotCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches rankpilot to the Trainer of ms-swift when it trains.

    Attributes:
        options: the options passed to `register`, in the command line's form.
        made: True once a Trainer has made one.
    """

    options: dict[str, Any]
    made = False

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        RankpilotCallback.made = True

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Attach to the Trainer once it trains; the Trainer is not complete yet."""
        attach_when_it_trains(self.trainer, self.options)


def register(**options: Any) -> None:
    """Offer the callback under its name in ms-swift's settings.

    Args:
        options: those of `attach`, policy included.

    Raises:
        ConfigError, UnknownNameError, BudgetError, PolicyFileError: an option is unknown, or its value is not valid.
    """
    RankpilotCallback.options = checked_options(options)
    if NAME not in callbacks_map:
        atexit.register(_tell_if_unused)
    callbacks_map[NAME] = RankpilotCallback


def _tell_if_unused() -> None:
    if not RankpilotCallback.made:
        tell(f"nothing was attached: no Trainer was made with the setting callbacks: [{NAME}].")
