"""Work in processes of one thread each, so that results do not depend on how many processes there are.

There are two kinds of work:

* *pieces*: a function is called with each of many values; whichever process is free takes the next one;
* *states*: an object is built in a process and stays there, and its methods are called one after another.

A process can die in the middle of its work, mostly for lack of memory. Then another one takes its place: it builds the
same objects, repeats their calls, and goes on with the work that was interrupted, so that results stay what they would
have been. Work at which processes die again and again ends in a `WorkerError` that names it.
"""

from __future__ import annotations

import os
import signal
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch

from ..errors import WorkerError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MOST_DEATHS = 3
"""A piece or call at which so many processes have died is given up."""


@dataclass(frozen=True)
class Call:
    """A call of a method of an object that a worker keeps.

    Attributes:
        method: takes the object first, such as `Stack.step`; pickled by its name.
        arguments: the further ones.
        name: what errors call this work.
        anew: whether the object begins anew with this call, so that no earlier one needs to be repeated.
    """

    method: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    name: str = "a call"
    anew: bool = False


class Workers(Protocol):
    """Runs pieces of work, and keeps objects: this process, or processes of this machine."""

    def spread(
        self, work: Callable[[Piece], Result], pieces: Sequence[Piece], describe: Callable[[Piece], str] = repr
    ) -> Iterator[tuple[Piece, Result]]:
        """Do pieces of work, all of which can be pickled; yields each with its result as soon as that is there.

        Args:
            work: what to do with each; pickled by its name.
            pieces: of the work.
            describe: names a piece in errors.

        Raises:
            WorkerError: processes died at one piece again and again; what the work raises is raised as it is.
        """

    def keep(self, key: int, make: Callable[[], Any]) -> None:
        """Keep an object, which `make` builds where it will live, in place of the one that had the key before."""

    def call(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        """Call methods of objects, side by side; returns their results by key.

        Raises:
            WorkerError: processes died at one call again and again; what a method raises is raised as it is.
        """

    def close(self) -> None:
        """End all processes; the objects are gone."""


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


def make_workers(count: int) -> Workers:
    """Processes that start when there is work for them, to be closed by the caller; one stands for this process."""
    return _ThisProcess() if count == 1 else _Processes(count)


@contextmanager
def worker_pool(count: int) -> Iterator[Workers]:
    """Workers that end with the block; see `make_workers`."""
    workers = make_workers(count)
    try:
        yield workers
    finally:
        workers.close()


def count_workers(asked: int) -> int:
    """Worker processes for a setting in which 0 stands for as many as there are cores."""
    return asked or os.cpu_count() or 1


class _ThisProcess:
    """No process at all: work is done when it is asked for."""

    def __init__(self) -> None:
        self._makes: dict[int, Callable[[], Any]] = {}
        self._objects: dict[int, Any] = {}

    def spread(
        self, work: Callable[[Piece], Result], pieces: Sequence[Piece], describe: Callable[[Piece], str] = repr
    ) -> Iterator[tuple[Piece, Result]]:
        for piece in pieces:
            with isolated():
                result = work(piece)
            yield piece, result

    def keep(self, key: int, make: Callable[[], Any]) -> None:
        self._makes[key] = make
        self._objects.pop(key, None)

    def call(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        results = {}
        for key, call in calls.items():
            with isolated():
                if key not in self._objects:
                    self._objects[key] = self._makes[key]()
                results[key] = call.method(self._objects[key], *call.arguments)
        return results

    def close(self) -> None:
        self._objects.clear()


@dataclass(frozen=True)
class _Request:
    """What a process is sent: a function of a piece, or of the object with this key, or one that builds that object."""

    key: int | None
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    build: bool = False


@dataclass(eq=False)
class _Job:
    """A piece or a call that somebody waits for, and how many processes have died at it."""

    index: int
    request: _Request
    name: Callable[[], str]
    anew: bool = False
    deaths: int = 0


class _Processes:
    """Processes of this machine."""

    def __init__(self, count: int) -> None:
        self.processes = [_Process() for _ in range(count)]

    def spread(
        self, work: Callable[[Piece], Result], pieces: Sequence[Piece], describe: Callable[[Piece], str] = repr
    ) -> Iterator[tuple[Piece, Result]]:
        jobs = [_Job(i, _Request(None, work, (piece,)), partial(describe, piece)) for i, piece in enumerate(pieces)]
        for job, succeeded, result in self._done(jobs):
            if not succeeded:
                raise result
            yield pieces[job.index], result

    def keep(self, key: int, make: Callable[[], Any]) -> None:
        self._home(key).keep(key, make)

    def call(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        jobs = [
            _Job(key, _Request(key, c.method, c.arguments), partial(str, c.name), c.anew) for key, c in calls.items()
        ]
        done = {job.index: (succeeded, result) for job, succeeded, result in self._done(jobs)}
        for succeeded, result in done.values():
            if not succeeded:
                raise result
        return {key: done[key][1] for key in calls}

    def close(self) -> None:
        for process in self.processes:
            process.stop()

    def _home(self, key: int) -> _Process:
        """The process in which an object lives."""
        return self.processes[key % len(self.processes)]

    def _done(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, bool, Any]]:
        """Jobs as they are done: whether each succeeded, and its result, or else what it raised."""
        waiting = {process: deque[_Job]() for process in self.processes}
        anywhere = deque[_Job]()
        for job in jobs:
            (anywhere if job.request.key is None else waiting[self._home(job.request.key)]).append(job)
        busy: dict[_Process, _Job] = {}
        try:
            while busy or anywhere or any(waiting.values()):
                for process in self.processes:
                    if process not in busy and (queue := waiting[process] or anywhere):
                        busy[process] = queue.popleft()
                        process.begin(busy[process])
                ready = wait([process.pipe for process in busy])
                for process in [process for process in busy if process.pipe in ready]:
                    if (answer := process.answer(busy[process])) is not None:
                        yield busy.pop(process), *answer
        finally:
            for process in busy:  # nobody waits for their answers any more
                process.stop()


class _Process:
    """One process, and what it takes to put another one in its place."""

    def __init__(self) -> None:
        self.pipe: Any = None
        self.process: Any = None
        self._makes: dict[int, Callable[[], Any]] = {}
        self._calls: dict[int, list[_Request]] = {}
        self._built: set[int] = set()
        self._pending: deque[_Request] = deque()

    def keep(self, key: int, make: Callable[[], Any]) -> None:
        """See `Workers`."""
        self._makes[key], self._calls[key] = make, []
        self._built.discard(key)

    def begin(self, job: _Job) -> None:
        """Start with a job; if this process does not have its object yet, with what makes the object as it was."""
        if not self.process:
            self._start()
        key = job.request.key
        if key is not None and key not in self._built:
            self._pending.append(_Request(key, self._makes[key], build=True))
            self._pending.extend([] if job.anew else self._calls[key])
        self._pending.append(job.request)
        self._send(job)

    def answer(self, job: _Job) -> tuple[bool, Any] | None:
        """Take an answer that has arrived: whether a job succeeded, and its result; None if it is not done yet.

        Raises:
            WorkerError: too many processes have died at the job.
        """
        try:
            succeeded, result = self.pipe.recv()
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
        self.pipe.close()
        if not self._pending:
            self.process.join(timeout=5)
        self.process.kill()
        self.process.join()
        self.process = self.pipe = None
        self._built.clear()
        self._pending.clear()

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()  # else nobody would notice that the process ended

    def _send(self, job: _Job) -> None:
        """Send the next request; a process that has died in the meantime is noticed here or by its answer."""
        try:
            self.pipe.send(self._pending[0])
        except ConnectionError:
            self._replace(job)

    def _replace(self, job: _Job) -> None:
        job.deaths += 1
        self.stop()
        if job.deaths == MOST_DEATHS:
            raise WorkerError(
                f"A worker process ended {MOST_DEATHS} times at the same work, for lack of memory perhaps: "
                f"{textwrap.shorten(job.name(), 200)}. Try fewer workers."
            )
        self.begin(job)


def _serve(pipe: Connection) -> None:
    """A worker's process: answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()
    objects: dict[int | None, Any] = {}
    while True:
        try:
            request: _Request = pipe.recv()
        except EOFError:
            return
        try:
            with isolated():
                if request.build:
                    objects[request.key] = request.function()
                    answer: tuple[bool, Any] = True, None
                else:
                    kept = () if request.key is None else (objects[request.key],)
                    answer = True, request.function(*kept, *request.arguments)
        except Exception as error:  # whatever it is, the parent raises it
            answer = False, error
        try:
            pipe.send(answer)
        except OSError:  # the parent is gone
            return
        except Exception as error:  # it cannot be pickled
            pipe.send((False, WorkerError(f"What a worker found cannot be sent to its parent: {error}")))


def _end_with_parent() -> None:
    """End this process when its parent is killed, also in the middle of a piece of work."""
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)
