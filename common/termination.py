"""What happens when the system asks a process to end (SIGTERM), as job schedulers do before they kill it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM
"""The exit status of a process that has ended because of SIGTERM: 143."""


class Terminated(SystemExit):
    """The process was asked to end. Where nothing catches this, its exit status is 143."""

    def __init__(self) -> None:
        super().__init__(STATUS)


def terminate() -> None:
    """Raise Terminated."""
    raise Terminated


def is_unhandled() -> bool:
    """Whether SIGTERM would end this process at once: nobody handles it, and this thread may."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@contextmanager
def on_sigterm(react: Callable[[], None] = terminate) -> Iterator[None]:
    """Call a function when SIGTERM comes while the block runs; without an effect outside of the main thread.

    Args:
        react: what is called; by default it ends the block with Terminated.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
