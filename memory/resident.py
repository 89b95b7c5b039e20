"""What Linux says of this process's memory: the resident set, and how far it rises."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def can_tell() -> bool:
    """Whether this system keeps a record of the peak that can be started anew."""
    return _CLEAR.exists()


def restart_peak() -> int | None:
    """Give free memory back to the system, and let its record of the peak start anew.

    Returns:
        Bytes resident now; None where that cannot be done.
    """
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
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found, f"{field} stands in {_STATUS}"
    return 1024 * int(found[1])
