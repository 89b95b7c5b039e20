"""The axolotl plugin: keeps a run within a budget.

    plugins: [rankpilot.integrations.axolotl.RankpilotPlugin]
    rankpilot: {budget: 80%}

axolotl continues without a plugin if its import fails, so this module imports only what axolotl itself has; methods
import the rest.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Settings of kernels that read the adapter's factors directly and bypass PEFT's layers."""


class RankpilotArgs(BaseModel):
    """The plugin's own key in a configuration.

    Attributes:
        rankpilot: options of `attach` by name, as in Python.
    """

    rankpilot: dict[str, Any] | None = None

    @field_validator("rankpilot", mode="before")
    @classmethod
    def check(cls, given: Any) -> Any:
        """Return the options; raise ValueError if one is unknown, or has a wrong value."""
        from ..common.errors import RankPilotError
        from .plugin import checked_options

        try:
            checked_options(given)
        except RankPilotError as error:
            raise ValueError(str(error)) from error
        return given


class RankpilotPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches rankpilot to the Trainer of axolotl when it trains."""

    def register(self, cfg: Any) -> None:
        """Turn off the fused kernels; axolotl would turn on those left unset.

        Args:
            cfg: the raw configuration.

        Raises:
            ConfigError: one of them is set to true.
        """
        from ..common.errors import ConfigError

        if cfg.get("adapter") not in ("lora", "qlora"):
            return
        for name in KERNELS:
            if cfg.get(name):
                raise ConfigError(
                    f"{name}: true does not go with rankpilot: the kernel bypasses PEFT's layers, so neither ranks nor "
                    f"memory can be controlled. Remove {name}, or RankpilotPlugin from plugins."
                )
            cfg[name] = False

    def get_input_args(self) -> str:
        """Return the name of the class describing the plugin's key."""
        return f"{__name__}.{RankpilotArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach to the Trainer once it trains.

        Args:
            cfg: the validated configuration.
            trainer: the new Trainer, with the callbacks added so far.
        """
        from .plugin import attach_when_it_trains, checked_options

        attach_when_it_trains(trainer, checked_options(cfg.rankpilot))
