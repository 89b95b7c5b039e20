"""Handling of SIGTERM, sent by job schedulers before they kill a process."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM
"""Exit status of a process ended by SIGTERM: 143."""


class Terminated(SystemExit):
    """Raised on SIGTERM. If uncaught, the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(STATUS)


def terminate() -> None:
    """Raise Terminated."""
    raise Terminated


def is_unhandled() -> bool:
    """True if SIGTERM would end this process at once: there is no handler, and this thread may install one."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@contextmanager
def on_sigterm(react: Callable[[], None] = terminate) -> Iterator[None]:
    """Call a function on SIGTERM while the block runs; no effect outside the main thread.

    Args:
        react: function to call; by default it ends the block with Terminated.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
