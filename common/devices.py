"""Which device to use, by name, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..errors import ConfigError


def find_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. ConfigError if there is no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one for each way of being absent
        raise ConfigError(f"No device {name!r} is at hand. Use cpu, or leave it at auto.") from error
    return torch.device(name)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Keep the precision of tensors inside, also where a caller's whole loop is under `torch.autocast`."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
