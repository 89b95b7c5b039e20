"""Reads this process's resident memory and its peak from Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def can_reset_peak() -> bool:
    """Whether this system keeps a record of the peak that can be reset."""
    return _CLEAR.exists()


def restart_peak() -> int | None:
    """Free unused memory, reset the record of the peak, and return bytes resident now; None if it cannot be reset."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak() -> int:
    """The highest number of bytes resident since `restart_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert match, f"{_STATUS} has no {field}"
    return 1024 * int(match[1])
