"""Real training steps, measured: bytes of tensors, and what the process or the allocator took for them."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..lora.held_state import state_bytes
from ..lora.peak import PeakMeter
from .memory_setup import Setup

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MeasuredStep:
    """A real step, the frozen model excluded unless said otherwise; None where the system does not tell.

    Attributes:
        peak_bytes: of live tensors on the CPU, of what the allocator had handed out on CUDA.
        resident_bytes: how far the process's resident memory rose above what it was without training state (CPU).
        process_bytes: the process's peak resident memory, the model and all libraries included (CPU).
        reserved_bytes: what the allocator had reserved, the model included (CUDA).
    """

    peak_bytes: int
    resident_bytes: int | None = None
    process_bytes: int | None = None
    reserved_bytes: int | None = None


def measure_step(setup: Setup) -> MeasuredStep:
    """Train a step to make the optimiser's state, then measure further ones. Adapters change.

    Args:
        setup: what to run.
    """
    _step(setup)
    held = state_bytes(setup.model, setup.optimizer, gradients=False)
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    meter = PeakMeter()
    meter.begin(setup.model, setup.optimizer)
    _step(setup)
    reserved = torch.cuda.max_memory_reserved(setup.device) if setup.device.type == "cuda" else None
    peak = meter.end(1, setup.model)
    assert peak is not None, "the step was measured"
    if reserved is not None:
        return MeasuredStep(peak, reserved_bytes=reserved)
    before = _restart_resident_peak()
    if before is None:
        return MeasuredStep(peak)
    _step(setup)
    highest = _resident("VmHWM")
    return MeasuredStep(peak, highest - before + held, highest)


def _step(setup: Setup) -> None:
    with setup.precision():
        loss = setup.model(**setup.batch).loss
    loss.backward()
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)


def _restart_resident_peak() -> int | None:
    """Give free memory back to the system and let its record of the peak start anew (Linux).

    Returns:
        Bytes resident now; None where that cannot be done.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found, f"{name} stands in {_STATUS}"
    return 1024 * int(found[1])
