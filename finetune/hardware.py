"""What a run's device is and what else it does, when the run begins."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from ..memory.budget import free_bytes

_PROCESSORS = Path("/proc/cpuinfo")


def hardware_facts(device: torch.device) -> dict[str, Any]:
    """Name of a device, the share of it that is busy, and its free and whole memory in bytes, as JSON values.

    The share is that of all cores over a tenth of a second; of a GPU as the driver tells it, None where it does not.

    Args:
        device: where the run trains.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total, busy = properties.name, int(properties.total_memory), _busy_gpu(device)
    else:
        cores = psutil.cpu_count() or 1
        name, total = f"{_processor()}, {cores} cores", int(psutil.virtual_memory().total)
        busy = psutil.cpu_percent(0.1) / 100
    return {"device": name, "busy": busy, "free_bytes": free_bytes(device), "total_bytes": total}


def _busy_gpu(device: torch.device) -> float | None:
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # torch asks NVIDIA's library, which may be absent or refuse
        return None


def _processor() -> str:
    """The name of the processor, as Linux gives it; elsewhere its kind."""
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
