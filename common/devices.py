"""Select a device by name, and measure the energy of a run where the hardware counts it.

Energy is never estimated. NVIDIA's library counts the energy of a whole GPU (`nvidia-ml-py`, from the Volta generation
on). Linux counts the energy of whole processors (RAPL, the powercap interface), if the user may read it. Both count
everything running there, and a processor's count excludes its memory.
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

from .errors import ConfigError
from .text import plural


def find_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" prefers CUDA. ConfigError if there is no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one per way of being absent
        raise ConfigError(f"Device {name!r} is not available. Use cpu or auto.") from error
    return torch.device(name)


META_AUTOCAST: ContextVar[torch.dtype | None] = ContextVar("META_AUTOCAST", default=None)
"""Autocast dtype on the meta device, not supported by torch itself; see `cost/record/device_on_meta.py`."""


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """Dtype of products with a tensor under the current autocast; None if autocast does not apply."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return None
    if kind == "meta":
        return META_AUTOCAST.get()
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def without_autocast() -> Iterator[None]:
    """Keep the dtype of tensors inside the block, even within a caller's `torch.autocast`."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


POWERCAP = Path("/sys/class/powercap")
"""Linux folder with the processors' energy counters."""


@dataclass(frozen=True, eq=False)
class EnergyCounter:
    """A hardware energy counter.

    Attributes:
        source: description of the counted devices.
        joules: joules since an arbitrary time; never decreases while the program runs.
    """

    source: str
    joules: Callable[[], float]


def find_energy_counter(device: torch.device, powercap: Path = POWERCAP) -> EnergyCounter | None:
    """Return the counter of a device: of the GPU, or else of all processors; None if there is none.

    Args:
        device: device of the run.
        powercap: folder of Linux's counters.
    """
    return _of_gpu(device) if device.type == "cuda" else _of_processors(powercap)


def _of_gpu(device: torch.device) -> EnergyCounter | None:
    with suppress(Exception):  # no library, no permission, or a GPU without a counter: each raises its own errors
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        source = f"{properties.name}, measured by NVML"
        return EnergyCounter(source, lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3)
    return None


def _of_processors(powercap: Path) -> EnergyCounter | None:
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    counters: list[_Package] = []
    with suppress(OSError, ValueError):  # usually readable by root only
        counters = [_Package(path) for path in packages]
    source = f"{plural(len(counters), 'processor')}, measured by RAPL"
    return EnergyCounter(source, lambda: sum(each.joules() for each in counters)) if counters else None


class _Package:
    """Counter of one processor; it wraps around to 0 after its largest value."""

    def __init__(self, folder: Path) -> None:
        self._file, self._total = folder / "energy_uj", 0
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())

    def joules(self) -> float:
        """Joules since this object was made; correct if read at least once an hour."""
        now = int(self._file.read_text())
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6
