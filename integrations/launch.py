"""Starts a command under `rankpilot run`, waits for it, and reports if nothing was attached."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .order import VARIABLE, Order, tell

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses for a command that cannot be started, as in a shell."""

NOTHING_ATTACHED = 3
"""Exit status for a successful command without a Trainer."""

ESCAPED = (
    "nothing was attached: no process of this command was seen to train with transformers' Trainer. Python started "
    "with -E, -I or -S, programs that replace PYTHONPATH, and other machines are not reached "
    "(docs/train-anywhere.md)."
)
UNTRAINED = "nothing was attached: a Trainer was made, but its `train` was not called."

_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def launch(command: Sequence[str], options: Mapping[str, Any], *, dry: bool = False) -> int:
    """Run a command with rankpilot attached to its Trainers, and wait for its end.

    Its standard streams are those of this process, and signals to this process reach it.

    Args:
        command: the program and its arguments.
        options: options of `attach`, see `Order.options`.
        dry: True to end the command before training.

    Returns:
        The exit status of the command, 128 + n if signal n ended it; `NOT_FOUND` or `NOT_EXECUTABLE` if it did not
        start, and `NOTHING_ATTACHED` if it succeeded without a Trainer.
    """
    with tempfile.TemporaryDirectory(prefix="rankpilot-run-") as folder:
        order = Order(folder, dict(options), dry)
        try:
            status = _ended(command, _environment(order))
        except OSError as error:
            return _not_started(command[0], error)
        if status == 0 and not (seen := order.events()) - {"made"}:
            tell(UNTRAINED if seen else ESCAPED)
            return 0 if seen else NOTHING_ATTACHED
    return status


def _environment(order: Order) -> dict[str, str]:
    """Return the environment of the command: every Python that it starts runs `site/sitecustomize.py`."""
    folders = [str(Path(__file__).resolve().parent / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, VARIABLE: order.text(), "PYTHONPATH": os.pathsep.join(folders)}


def _ended(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, and forward signals to it; return its exit status.

    Ignored signals are left alone, since the command inherits that. A terminal interrupts the command by itself.
    """
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and _in_foreground():
            return
        for process in started:
            process.send_signal(number)
        early.extend([] if started else [number])

    known = [number for name in _FORWARDED if (number := getattr(signal, name, None)) is not None]
    before = {number: signal.getsignal(number) for number in known}
    changed = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, forward)
    try:
        started.append(process := subprocess.Popen(command, env=environment))
        for number in early:
            process.send_signal(number)
        status = process.wait()
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _in_foreground() -> bool:
    """True if a terminal's interrupt goes to this process, and so to the command, which is in its process group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _not_started(name: str, error: OSError) -> int:
    """Report that a command cannot be started; return the exit status."""
    if shutil.which(name) is None and Path(name).suffix == ".py" and Path(name).is_file():
        tell(f"error: {name} is not executable. For a script, put python before it: -- python {name}")
        return NOT_EXECUTABLE
    if isinstance(error, FileNotFoundError):
        tell(f"error: Command not found: {name}")
        return NOT_FOUND
    tell(f"error: Cannot run {name}: {error.strerror}.")
    return NOT_EXECUTABLE
