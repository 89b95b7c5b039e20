"""Work in processes of one thread each, so that results do not depend on how many processes there are.

There are two kinds of work:

* *pieces*: a function is called with each of many values; whichever process is free takes the next one;
* *states*: an object is built in a process and stays there, and its methods are called one after another.

A process can die in the middle of its work, mostly for lack of memory. Then another one takes its place: it builds the
same objects, repeats their calls, and goes on with the work that was interrupted, so that results stay what they would
have been. Work at which processes die again and again ends in a `WorkerError` that names it.

Processes run on this machine, or on those that `running_on` names, such as a cluster's (`common.cluster`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from .worker_process import Job, Machines, Request, ThisMachine, Worker, isolated

__all__ = ["Call", "Workers", "count_workers", "isolated", "make_workers", "running_on", "worker_pool"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_MACHINES: ContextVar[Machines | None] = ContextVar("machines", default=None)
"""Where processes run; None stands for this machine."""


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
    """Runs pieces of work, and keeps objects: this process, or others, here or on other machines."""

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
def running_on(machines: Machines) -> Iterator[None]:
    """Let all workers that are made inside the block be processes of some machines, also where there is but one."""
    token = _MACHINES.set(machines)
    try:
        yield
    finally:
        _MACHINES.reset(token)


def make_workers(count: int) -> Workers:
    """Processes that start when there is work for them, to be closed by the caller.

    One stands for this process, unless processes run elsewhere; see `running_on`.
    """
    machines = _MACHINES.get()
    return _ThisProcess() if count == 1 and machines is None else _Processes(count, machines or ThisMachine())


@contextmanager
def worker_pool(count: int) -> Iterator[Workers]:
    """Workers that end with the block; see `make_workers`."""
    workers = make_workers(count)
    try:
        yield workers
    finally:
        workers.close()


def count_workers(asked: int) -> int:
    """Worker processes for a setting in which 0 stands for as many as there are cores, here or where processes run."""
    return asked or (_MACHINES.get() or ThisMachine()).size()


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


class _Processes:
    """Processes of some machines."""

    def __init__(self, count: int, machines: Machines) -> None:
        self._machines = machines
        self.workers = [Worker(machines) for _ in range(count)]

    def spread(
        self, work: Callable[[Piece], Result], pieces: Sequence[Piece], describe: Callable[[Piece], str] = repr
    ) -> Iterator[tuple[Piece, Result]]:
        jobs = [Job(i, Request(None, work, (piece,)), partial(describe, piece)) for i, piece in enumerate(pieces)]
        for job, succeeded, result in self._done(jobs):
            if not succeeded:
                raise result
            yield pieces[job.index], result

    def keep(self, key: int, make: Callable[[], Any]) -> None:
        self._home(key).keep(key, make)

    def call(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        jobs = [Job(key, Request(key, c.method, c.arguments), partial(str, c.name), c.anew) for key, c in calls.items()]
        done = {job.index: (succeeded, result) for job, succeeded, result in self._done(jobs)}
        for succeeded, result in done.values():
            if not succeeded:
                raise result
        return {key: done[key][1] for key in calls}

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _home(self, key: int) -> Worker:
        """The worker that has an object."""
        return self.workers[key % len(self.workers)]

    def _done(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, bool, Any]]:
        """Jobs as they are done: whether each succeeded, and its result, or else what it raised."""
        waiting = {worker: deque[Job]() for worker in self.workers}
        anywhere = deque[Job]()
        for job in jobs:
            (anywhere if job.request.key is None else waiting[self._home(job.request.key)]).append(job)
        busy: dict[Worker, Job] = {}
        try:
            while busy or anywhere or any(waiting.values()):
                for worker in self.workers:
                    if worker not in busy and (queue := waiting[worker] or anywhere):
                        busy[worker] = queue.popleft()
                        worker.begin(busy[worker])
                ready = self._machines.ready([worker.process for worker in busy])
                for worker in [worker for worker in busy if worker.process in ready]:
                    if (answer := worker.answer(busy[worker])) is not None:
                        yield busy.pop(worker), *answer
        finally:
            for worker in busy:  # nobody waits for their answers any more
                worker.stop()
