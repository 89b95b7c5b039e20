"""The plugin of axolotl, which keeps its run inside a budget:

    plugins: [rankpilot.integrations.axolotl.RankpilotPlugin]
    rankpilot: {budget: 80%}

axolotl goes on without a plugin that it cannot import, so this module imports nothing that axolotl lacks; its methods
import the rest.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Settings of kernels that read the factors of an adapter past PEFT, and never call its layers."""


class RankpilotArgs(BaseModel):
    """The key that the plugin adds to a configuration.

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
        """Turn off the fused kernels before axolotl turns them on, which it does where they are not set.

        Args:
            cfg: the configuration as it was written.

        Raises:
            ConfigError: one of them is asked for.
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
        """Return the name of the class that describes the plugin's key."""
        return f"{__name__}.{RankpilotArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach to the Trainer once it trains.

        Args:
            cfg: the configuration as it was validated.
            trainer: with the callbacks that axolotl has added so far.
        """
        from .plugin import attach_when_it_trains, checked_options

        attach_when_it_trains(trainer, checked_options(cfg.rankpilot))
