"""Workers on the machines of a Ray cluster: all that knows Ray.

A worker is an actor that calls functions, one after another. When its node dies, Ray starts it on another one and
repeats the call, so a call must say all that it takes to come to its result.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import ConfigError, UnsupportedError, first_line

LOCAL, AUTO = "local", "auto"
"""Addresses of a cluster that is started on this machine, and of the one that runs here."""

CONNECT_SECONDS = 10.0
"""A cluster answers within that time; Ray itself would try for many minutes."""


class RayWorker:
    """An actor with the part of `concurrent.futures.Executor` that vector environments need.

    Args:
        ray: the library, connected.
        last: whether the connection ends with this worker.
    """

    def __init__(self, ray: Any, *, last: bool) -> None:
        self._ray, self._last = ray, last
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(_Actor)
        self._actor = actor.remote()

    @classmethod
    def start(cls, address: str, count: int) -> Sequence[RayWorker]:
        """So many workers on a cluster.

        Args:
            address: "local" starts a cluster on this machine, and ends it with the workers; "auto" joins the one that
                runs here, and HOST:PORT the one with that address, of which this machine must be a part.
            count: of the workers; nodes take turns.

        Raises:
            UnsupportedError: Ray is not installed.
            ConfigError: no address, or no cluster there.
        """
        ray = _connected(address)
        return [cls(ray, last=number == count - 1) for number in range(count)]

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function, pickled by its name, there; the future has its result, or its error."""
        future: Future[Any] = self._actor.call.remote(function, *arguments).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the actor, and the connection with the last one."""
        self._ray.kill(self._actor)
        if self._last:
            self._ray.shutdown()


class _Actor:
    """What an actor is."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _connected(address: str) -> Any:
    """Ray, connected to a cluster, or to one that it starts."""
    # No reports of its use to its makers, nor a warning of what it will do later; and processes of a cluster that is
    # started here run at this one's priority: at Ray's low one other work starves them.
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness"):
        os.environ.setdefault(name, "0")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError("Working on a cluster needs Ray: pip install 'rankpilot[cluster]'.") from error
    _check_address(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        needs = "the same versions of Python and Ray, and know its token if it has one (docs/train-policy.md)"
        trouble = f"The cluster at {address!r} cannot be joined: {first_line(error)}"
        raise ConfigError(f"{trouble}. This machine must be part of it, with {needs}.") from error
    return ray


def _check_address(address: str) -> None:
    """Refuse what is no address, and an address at which nothing answers."""
    if address in (LOCAL, AUTO):
        return
    if not re.fullmatch(r"[^\s:/]+:\d{1,5}", address):
        allowed = f"{LOCAL!r}, {AUTO!r} or HOST:PORT of a Ray cluster that this machine is part of"
        raise ConfigError(f"--cluster is {allowed}; got {address!r}.")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        start = f"Start a cluster there: ray start --head --port {port}."
        raise ConfigError(f"Nothing answers at {address} ({error}). {start}") from error
