"""A worker: a process that answers requests, and another one in its place when it dies; see `common.workers`."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Protocol

import torch

from ..errors import WorkerError

MOST_DEATHS = 3
"""A piece or call at which so many processes have died is given up."""


@contextmanager
def isolated() -> Iterator[None]:
    """As if in a worker's process: one thread, and no trace in the random state (bases are adapted at random)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Request:
    """What a process is sent: a function of a piece, or of the object with this key, or one that builds that object."""

    key: int | None
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    build: bool = False


@dataclass(eq=False)
class Job:
    """A piece or a call that somebody waits for, and how many processes have died at it."""

    index: int
    request: Request
    name: Callable[[], str]
    anew: bool = False
    deaths: int = 0


class Process(Protocol):
    """A process that answers requests, one after another."""

    def send(self, request: Request) -> None:
        """Send a request; ConnectionError if the process has ended."""

    def receive(self) -> tuple[bool, Any]:
        """The answer to it: whether it succeeded, and its result, or else what it raised.

        Raises:
            EOFError, ConnectionError: the process has ended.
        """

    def end(self, *, idle: bool) -> None:
        """End the process.

        Args:
            idle: it has no work, so that it may be given the time to end by itself.
        """


class Machines(Protocol):
    """Where processes can run."""

    def size(self) -> int:
        """How many processes are of use."""

    def start(self) -> Process:
        """Start one."""

    def ready(self, processes: Sequence[Any]) -> Sequence[Any]:
        """Those of some processes whose answers have arrived, or that have ended; waits until there is one."""


class Worker:
    """One process at a time, and what it takes to put another one in its place.

    Args:
        machines: where processes run.
    """

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self.process: Process | None = None
        self._makes: dict[int, Callable[[], Any]] = {}
        self._calls: dict[int, list[Request]] = {}
        self._built: set[int] = set()
        self._pending: deque[Request] = deque()

    def keep(self, key: int, make: Callable[[], Any]) -> None:
        """See `Workers`."""
        self._makes[key], self._calls[key] = make, []
        self._built.discard(key)

    def begin(self, job: Job) -> None:
        """Start with a job; if this process does not have its object yet, with what makes the object as it was."""
        if not self.process:
            self.process = self._machines.start()
        key = job.request.key
        if key is not None and key not in self._built:
            self._pending.append(Request(key, self._makes[key], build=True))
            self._pending.extend([] if job.anew else self._calls[key])
        self._pending.append(job.request)
        self._send(job)

    def answer(self, job: Job) -> tuple[bool, Any] | None:
        """Take an answer that has arrived: whether a job succeeded, and its result; None if it is not done yet.

        Raises:
            WorkerError: too many processes have died at the job.
        """
        assert self.process is not None
        try:
            succeeded, result = self.process.receive()
        except (EOFError, ConnectionError):
            self._replace(job)
            return None
        request, key = self._pending.popleft(), job.request.key
        if request.build and succeeded:
            assert key is not None
            self._built.add(key)
        elif request.build:
            self._pending.clear()
        if self._pending:  # this was something that the job needs; a repeated call that failed then may fail again
            self._send(job)
            return None
        if key is not None and not request.build:
            self._calls[key] = [request] if job.anew else [*self._calls[key], request]
        return succeeded, result

    def stop(self) -> None:
        """End the process; another one takes its place when there is work."""
        if not self.process:
            return
        self.process.end(idle=not self._pending)
        self.process = None
        self._built.clear()
        self._pending.clear()

    def _send(self, job: Job) -> None:
        """Send the next request; a process that has died in the meantime is noticed here or by its answer."""
        assert self.process is not None
        try:
            self.process.send(self._pending[0])
        except ConnectionError:
            self._replace(job)

    def _replace(self, job: Job) -> None:
        job.deaths += 1
        self.stop()
        if job.deaths == MOST_DEATHS:
            raise WorkerError(
                f"A worker process ended {MOST_DEATHS} times at the same work, for lack of memory perhaps: "
                f"{textwrap.shorten(job.name(), 200)}. Try fewer workers."
            )
        self.begin(job)


class ThisMachine:
    """Processes of this machine; see `Machines`."""

    def size(self) -> int:
        """One process for each core."""
        return os.cpu_count() or 1

    def start(self) -> LocalProcess:
        """Start one."""
        return LocalProcess()

    def ready(self, processes: Sequence[LocalProcess]) -> Sequence[LocalProcess]:
        """See `Machines`."""
        ready = wait([process.pipe for process in processes])
        return [process for process in processes if process.pipe in ready]


class LocalProcess:
    """A process of this machine; see `Process`."""

    pipe: Any

    def __init__(self) -> None:
        context = _process_context()
        self.pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, dict(os.environ)), daemon=True)
        self._process.start()
        there.close()  # else nobody would notice that the process ended

    def send(self, request: Request) -> None:
        """See `Process`."""
        self.pipe.send(request)

    def receive(self) -> tuple[bool, Any]:
        """See `Process`."""
        succeeded, result = self.pipe.recv()
        return succeeded, result

    def end(self, *, idle: bool) -> None:
        """See `Process`."""
        self.pipe.close()
        if idle:
            self._process.join(timeout=5)
        self._process.kill()
        self._process.join()


def _process_context() -> Any:
    """How processes start: on Linux as forks of a server that has loaded what this process has, which takes seconds.

    The server is started once, on its own, so that its forks have none of this process's threads and state. Where there
    is a GPU each process starts alone: libraries open it when they are loaded, and a fork cannot use it after that.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    package = __name__.partition(".")[0]
    context.set_forkserver_preload([name for name in sys.modules if name.partition(".")[0] == package])
    return context


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    """A worker's process: answer requests until the pipe closes."""
    os.environ.update(environment)  # which may have changed since the server of processes was started
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()
    objects: dict[int, Any] = {}
    while True:
        try:
            request: Request = pipe.recv()
        except EOFError:
            return
        answer = answered(request, objects)
        try:
            pipe.send(answer)
        except OSError:  # the parent is gone
            return
        except Exception as error:  # it cannot be pickled
            pipe.send(not_sent(error))


def answered(request: Request, objects: dict[int, Any]) -> tuple[bool, Any]:
    """What a process answers: whether a request succeeded, and its result, or else what it raised.

    Args:
        request: what to do.
        objects: that the process keeps.
    """
    key = request.key
    try:
        with isolated():
            if request.build:
                assert key is not None
                objects[key] = request.function()
                return True, None
            return True, request.function(*(() if key is None else (objects[key],)), *request.arguments)
    except Exception as error:  # whatever it is, the parent raises it
        return False, error


def not_sent(error: Exception) -> tuple[bool, WorkerError]:
    """The answer in place of one that cannot be pickled."""
    return False, WorkerError(f"What a worker found cannot be sent to its parent: {error}")


def _end_with_parent() -> None:
    """End this process when its parent is killed, also in the middle of a piece of work."""
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)
