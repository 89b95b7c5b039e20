"""Workers on the machines of a Ray cluster; the only module with Ray code.

A worker is an actor for calling functions, one after another. If its node dies, Ray restarts it on another one and
repeats the call, so a call must carry everything needed to compute its result.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from .errors import ConfigError, UnsupportedError, first_line, install

LOCAL, AUTO = "local", "auto"
"""Addresses to start a cluster on this machine, and to join the one running here."""

CONNECT_SECONDS = 10.0
"""Timeout for connecting to a cluster, in seconds; Ray itself would retry for many minutes."""


class RayWorker:
    """An actor with the subset of `concurrent.futures.Executor` needed by vector environments.

    Args:
        ray: the library, connected.
        last: True to close the connection with this worker.
    """

    def __init__(self, ray: Any, *, last: bool) -> None:
        self._ray, self._last = ray, last
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(_Actor)
        self._actor = actor.remote()

    @classmethod
    def start(cls, address: str, count: int) -> Sequence[RayWorker]:
        """Start workers on a cluster.

        Args:
            address: "local" starts a cluster on this machine, and ends it with the workers; "auto" joins the one
                running here, and HOST:PORT the one at that address; this machine must be part of it.
            count: number of workers, spread over the nodes.

        Raises:
            UnsupportedError: Ray is not installed.
            ConfigError: an invalid address, or no cluster there.
        """
        ray = _connected(address)
        return [cls(ray, last=number == count - 1) for number in range(count)]

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function remotely, pickled by name; the future holds its result or error."""
        future: Future[Any] = self._actor.call.remote(function, *arguments).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the actor, and close the connection after the last one."""
        self._ray.kill(self._actor)
        if self._last:
            self._ray.shutdown()


class _Actor:
    """Implementation of the actor."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _connected(address: str) -> Any:
    """Return Ray, connected to an existing or new cluster."""
    # No usage reports and no deprecation warnings; and processes of a cluster started here run at this process's
    # priority: at Ray's low one, other work starves them.
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness"):
        os.environ.setdefault(name, "0")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(f"Using a cluster requires Ray: {install('cluster')}.") from error
    _check_address(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        needs = "the same versions of Python and Ray, and the cluster's token if it has one (docs/train-policy.md)"
        trouble = f"Cannot join the cluster at {address!r}: {first_line(error)}"
        raise ConfigError(f"{trouble}. This machine must be part of it, with {needs}.") from error
    return ray


def _check_address(address: str) -> None:
    """Reject an invalid address, or one without a response."""
    if address in (LOCAL, AUTO):
        return
    if not re.fullmatch(r"[^\s:/]+:\d{1,5}", address):
        allowed = f"{LOCAL!r}, {AUTO!r} or HOST:PORT of a Ray cluster that this machine is part of"
        raise ConfigError(f"--cluster must be {allowed}; got {address!r}.")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        start = f"Start a cluster there: ray start --head --port {port}."
        raise ConfigError(f"No answer from {address} ({error}). {start}") from error
