"""Work in processes of one thread each, so that results do not depend on how many processes there are.

There are two kinds of work:

* *pieces*: a function is called with each of many values; whichever process is free takes the next one;
* *states*: an object is built in a process and stays there, and its methods are called one after another.

A process can die in the middle of its work, mostly for lack of memory. Then another one takes its place: it builds the
same objects, repeats their calls, and goes on with the work that was interrupted, so that results stay what they would
have been. Work at which processes die again and again ends in a `WorkerError` that names it.

Each process is an `Executor` of its own: this process, one of this machine, or one of the `Machines` that `ELSEWHERE`
names, such as a cluster's (`common.cluster`).
"""

import os
import signal
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch

from ..errors import WorkerError

Piece = TypeVar("Piece")
Result = TypeVar("Result")
_Make = Callable[[], Any]
_Objects = dict[int, Any]

MOST_DEATHS = 3
"""A piece or call at which so many processes have died is given up."""

MOST_CORES = 100
"""More processes of this machine only if asked for: each takes some seven open files, and 1,024 is a usual limit."""

OBJECTS: _Objects = {}
"""What a worker's process keeps."""


class Machines(Protocol):
    """Where processes run, other than on this machine."""

    def size(self) -> int:
        """How many processes are of use."""

    def start(self) -> Executor:
        """Start a process.

        It does one thing at a time, and its futures raise BrokenExecutor if it dies. `shutdown` ends it at once.
        """


ELSEWHERE: ContextVar[Machines | None] = ContextVar("machines", default=None)
"""Where processes of all workers run that are made in this context; None stands for this machine."""


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


@dataclass(eq=False)
class _State:
    """An object that a worker keeps.

    Attributes:
        make: builds it.
        calls: those since it last began anew.
        home: the process in which it is as these calls left it, if there is one.
    """

    make: _Make
    calls: list[Call] = field(default_factory=list)
    home: Executor | None = None


@dataclass(eq=False)
class _Job:
    """A piece, or a call of a state's method with the state's key, and how many processes have died at it."""

    key: Any
    call: Call
    state: _State | None = None
    deaths: int = 0

    def count_death(self) -> None:
        """Note that a process has died at it; WorkerError if it is not worth another."""
        self.deaths += 1
        if self.deaths == MOST_DEATHS:
            often = f"A worker process ended {MOST_DEATHS} times at the same work, for lack of memory perhaps"
            raise WorkerError(f"{often}: {textwrap.shorten(self.call.name, 200)}. Try fewer workers.")


class Workers:
    """Processes that do pieces of work and keep objects; each starts when there is work for it.

    Args:
        count: how many there are.
        start: starts one.
    """

    def __init__(self, count: int, start: Callable[[], Executor]) -> None:
        self._start = start
        self._processes: list[Executor | None] = [None] * count
        self._states: dict[int, _State] = {}

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
        waiting = deque(_Job(piece, Call(work, (piece,), describe(piece))) for piece in pieces)
        for job, answer in self._done([waiting] * len(self._processes)):
            yield job.key, answer.result()

    def keep(self, key: int, make: _Make) -> None:
        """Keep an object, which `make` builds where it will live, in place of the one that had the key before."""
        self._states[key] = _State(make)

    def call(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        """Call methods of objects, side by side; returns their results by key.

        Raises:
            WorkerError: processes died at one call again and again; what a method raises is raised as it is.
        """
        waiting = [deque[_Job]() for _ in self._processes]
        for key, call in calls.items():
            waiting[key % len(waiting)].append(_Job(key, call, self._states[key]))
        answers = {job.key: answer for job, answer in self._done(waiting)}
        return {key: answers[key].result() for key in calls}

    def close(self) -> None:
        """End all processes; another takes the place of each when there is work."""
        for place in range(len(self._processes)):
            self._stop(place)

    def _done(self, waiting: Sequence[deque[_Job]]) -> Iterator[tuple[_Job, Future[Any]]]:
        """Jobs, as they are done, with their answers; each worker takes them from its own queue, or all from one."""
        busy: dict[Future[Any], tuple[int, _Job]] = {}
        try:
            while busy or any(waiting):
                at_work = {place for place, _ in busy.values()}
                for place, queue in enumerate(waiting):
                    if queue and place not in at_work:
                        job = queue.popleft()
                        busy[self._begin(place, job)] = place, job
                for answer in wait(busy, return_when=FIRST_COMPLETED).done:
                    place, job = busy.pop(answer)
                    error = answer.exception()
                    if isinstance(error, BrokenExecutor):
                        self._stop(place)
                        job.count_death()
                        waiting[place].appendleft(job)
                        continue
                    if state := job.state:
                        state.home = None if error else self._processes[place]
                        state.calls = [job.call] if job.call.anew else [*state.calls, job.call]
                    yield job, answer
        finally:
            for place, _ in busy.values():  # nobody waits for their answers any more
                self._stop(place)

    def _begin(self, place: int, job: _Job) -> Future[Any]:
        """Start with a job; if the process does not have the job's object, with what makes the object as it was."""
        process = self._processes[place] = self._processes[place] or self._start()
        key, make, past = None, None, list[Call]()
        if state := job.state:
            key = job.key
            if state.home is not process:
                make, past = state.make, [] if job.call.anew else state.calls
        try:
            return process.submit(perform, job.call, key, make, past)
        except BrokenExecutor:  # the process died when it had nothing to do
            self._stop(place)
            return self._begin(place, job)

    def _stop(self, place: int) -> None:
        if process := self._processes[place]:
            self._processes[place] = None
            process.shutdown()


def make_workers(count: int) -> Workers:
    """Workers to be closed by the caller; one alone is this process, unless processes run elsewhere."""
    machines = ELSEWHERE.get()
    return Workers(count, machines.start if machines else _ThisProcess if count == 1 else _LocalProcess)


def worker_pool(count: int) -> closing[Workers]:
    """Workers that end with a block; see `make_workers`."""
    return closing(make_workers(count))


def count_workers(asked: int) -> int:
    """Worker processes for a setting in which 0 stands for as many as there are cores, here or where processes run."""
    machines = ELSEWHERE.get()
    return asked or (machines.size() if machines else min(os.cpu_count() or 1, MOST_CORES))


def perform(call: Call, key: int | None, make: _Make | None, past: Sequence[Call], objects: _Objects = OBJECTS) -> Any:
    """What a process does: one call, of a function or of a method of one of its objects.

    Args:
        call: what to do; what it raises is raised.
        key: of the object that it is a method of.
        make: builds this object first.
        past: calls that then make the object as it was; one that failed then may fail again.
        objects: those of the process.
    """
    if make and key is not None:
        objects.pop(key, None)
        with isolated():
            objects[key] = make()
        for each in past:
            with suppress(Exception), isolated():
                each.method(objects[key], *each.arguments)
    with isolated():
        return call.method(*([] if key is None else [objects[key]]), *call.arguments)


class _ThisProcess(Executor):
    """No process at all: work is done when it is asked for."""

    def __init__(self) -> None:
        self._objects: _Objects = {}

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(function(*arguments, objects=self._objects, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class _LocalProcess(ProcessPoolExecutor):
    """A process of this machine."""

    def __init__(self) -> None:
        super().__init__(1, _process_context(), _prepare, (dict(os.environ),))

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(function, *arguments, **named)
        # The process alone reads what it is sent, and writes answers: if it is killed, nobody waits for the rest.
        self._call_queue._reader.close()  # type: ignore[attr-defined]
        self._result_queue._writer.close()  # type: ignore[attr-defined]
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for process in list((self._processes or {}).values()):
            process.kill()
        super().shutdown(wait, cancel_futures=cancel_futures)


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


def _prepare(environment: dict[str, str]) -> None:
    """Make this a worker's process: one thread, deaf to Ctrl-C, and gone when its parent is."""
    os.environ.update(environment)  # which may have changed since the server of processes was started
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed, also in the middle of a piece of work."""
    if parent := parent_process():
        parent.join()
        os._exit(1)
