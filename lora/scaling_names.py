"""Names of what stays when a rank changes, for settings: nothing here loads torch. `lora/scaling.py` follows them."""

from __future__ import annotations

from typing import Literal, get_args

from ..errors import ConfigError

Scaling = Literal["alpha", "constant"]
"""What stays when a rank changes: "alpha", or the scaling itself ("constant")."""


def check_scaling(scaling: object) -> None:
    """Raise ConfigError unless this is a `Scaling`."""
    if scaling not in get_args(Scaling):
        raise ConfigError(
            f"scaling is 'alpha' (lora_alpha stays when a rank changes, and PEFT divides it by the rank) or 'constant' "
            f"(lora_alpha / r stays); got {scaling!r}."
        )
