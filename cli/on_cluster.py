"""Work on a cluster, for commands that have the option --cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from ..errors import ConfigError
from .progress import console


def on_cluster(address: str | None, device: str = "cpu") -> AbstractContextManager[None]:
    """Let workers be processes of a cluster inside the block; without an address, they are this machine's.

    Args:
        address: see `running_on_cluster`.
        device: where episodes train.

    Raises:
        ConfigError: they would train on something else than CPUs, or see `running_on_cluster`.
        UnsupportedError: Ray is not installed.
    """
    if address is None:
        return nullcontext()
    from ..common.cluster import running_on_cluster
    from ..common.devices import find_device
    from ..env.episodes.stacked import rounding_digest

    if (found := find_device(device)).type != "cpu":
        raise ConfigError(f"Workers of a cluster train on CPUs, and --device {device} is {found}. Pass --device cpu.")
    return running_on_cluster(address, rounding_digest, lambda line: console.print(line, markup=False, soft_wrap=True))
