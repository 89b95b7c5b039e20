"""Work on a cluster, for commands that have the option --cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ConfigError
from .progress import console


@contextmanager
def on_cluster(address: str | None, device: str = "cpu") -> Iterator[None]:
    """Let workers be processes of a cluster inside the block; without an address, they are this machine's.

    Args:
        address: see `running_on_cluster`.
        device: where episodes train.

    Raises:
        ConfigError: they would train on something else than CPUs, or see `running_on_cluster`.
        UnsupportedError: Ray is not installed.
    """
    if address is None:
        yield
        return
    from ..common.cluster import running_on_cluster
    from ..common.devices import find_device
    from ..env.episodes.stacked import rounding_digest

    if (found := find_device(device)).type != "cpu":
        raise ConfigError(f"Workers of a cluster train on CPUs, and --device {device} is {found}. Pass --device cpu.")
    with running_on_cluster(address, rounding_digest, lambda line: console.print(line, markup=False, soft_wrap=True)):
        yield
