"""Which device to use, by name, and the energy that a run takes there, where hardware counts it.

Energy is never estimated. NVIDIA's library counts what a whole GPU has taken (`nvidia-ml-py`, from the Volta generation
on). Linux counts what whole processors have taken (RAPL, the powercap interface), where it lets the user read that.
Both count everything that runs there, and a processor's count leaves its memory out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

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


META_AUTOCAST: ContextVar[torch.dtype | None] = ContextVar("META_AUTOCAST", default=None)
"""The precision of autocast on the meta device, of which torch knows nothing; see `cost/device_on_meta.py`."""


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The precision of products with a tensor under the autocast of now; None where autocast leaves it alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return None
    if kind == "meta":
        return META_AUTOCAST.get()
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def without_autocast() -> Iterator[None]:
    """Keep the precision of tensors inside, also where a caller's whole loop is under `torch.autocast`."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


POWERCAP = Path("/sys/class/powercap")
"""Where Linux tells the energy of processors."""


@dataclass(frozen=True, eq=False)
class EnergyCounter:
    """A counter of the hardware.

    Attributes:
        source: what is counted, in words.
        joules: since some time before; never falls while the program runs.
    """

    source: str
    joules: Callable[[], float]


def find_energy_counter(device: torch.device, powercap: Path = POWERCAP) -> EnergyCounter | None:
    """The counter of a device: of the GPU, or else of all processors; None where the machine does not tell.

    Args:
        device: where a run trains.
        powercap: the folder of Linux's counters.
    """
    return _of_gpu(device) if device.type == "cuda" else _of_processors(powercap)


def _of_gpu(device: torch.device) -> EnergyCounter | None:
    with suppress(Exception):  # no library, no right to ask, or a GPU that does not count: each has errors of its own
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return EnergyCounter(
            f"{properties.name}, counted by NVML",
            lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3,
        )
    return None


def _of_processors(powercap: Path) -> EnergyCounter | None:
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    try:
        counters = [_Package(path) for path in packages]
    except (OSError, ValueError):  # the kernel lets root alone read them, as a rule
        return None
    if not counters:
        return None
    many = "processors" if len(counters) > 1 else "processor"
    return EnergyCounter(f"{len(counters)} {many}, counted by RAPL", lambda: sum(each.joules() for each in counters))


class _Package:
    """The counter of one processor, which begins again at 0 after its largest value."""

    def __init__(self, folder: Path) -> None:
        self._file, self._total = folder / "energy_uj", 0
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())

    def joules(self) -> float:
        """Joules since this object was made; right if it is asked once an hour."""
        now = int(self._file.read_text())
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6
