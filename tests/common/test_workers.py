"""Work spread over processes, objects that live in them, and what happens when one dies."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import Connection
from operator import call
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from rankpilot.common.workers import MOST_DEATHS, Call, Workers, isolated, worker_pool
from rankpilot.errors import WorkerError


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    """Two processes; they take a while to start."""
    with worker_pool(2) as workers:
        yield workers


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 2], ids=["this process", "two processes"])
def workers(request: pytest.FixtureRequest, two: Workers) -> Iterator[Workers]:
    if request.param == 2:
        yield two
        return
    with worker_pool(1) as one:
        yield one


@pytest.mark.parametrize("pieces", [[], [5, 3, 20, 3, 0]])
def test_results_do_not_depend_on_the_number_of_workers(workers: Workers, pieces: list[int]) -> None:
    found = list(workers.spread(math.factorial, pieces))
    assert sorted(found) == sorted((piece, math.factorial(piece)) for piece in pieces)


def test_errors_in_a_worker_are_raised(workers: Workers, two: Workers) -> None:
    """Also where a result cannot be sent."""
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(workers.spread(math.sqrt, [-1.0]))
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        list(two.spread(_generator, [3]))
    assert list(workers.spread(math.sqrt, [4.0])) == [(4.0, 2.0)], "the processes go on"


def _generator(count: int) -> Iterator[int]:
    return (number for number in range(count))


def test_processes_end_with_the_pool() -> None:
    before = set(active_children())
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"), worker_pool(2) as workers:
        list(workers.spread(math.sqrt, [-1.0]))
    assert set(active_children()) <= before


def test_one_worker_works_when_it_is_asked_and_leaves_the_random_state_as_it_was() -> None:
    done: list[int] = []
    before = torch.get_rng_state()
    with worker_pool(1) as workers:
        assert next(workers.spread(done.append, [1, 2, 3])) == (1, None)
        assert done == [1]
        drawn = [result for _, result in workers.spread(torch.rand, [3, 3])]
        assert torch.equal(torch.get_rng_state(), before), "also between pieces"
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn), "pieces do not depend on those before them"


@pytest.mark.usefixtures("two_threads")
def test_each_worker_has_one_thread(workers: Workers) -> None:
    for _, threads in workers.spread(call, [torch.get_num_threads] * 3):
        assert (threads, torch.get_num_threads()) == (1, 2), "and this process as many as before"


@pytest.mark.usefixtures("two_threads")
def test_threads_and_random_state_are_put_back_after_an_error() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        torch.rand(2)
        assert torch.get_num_threads() == 1
        raise Broken

    with pytest.raises(Broken), isolated():
        fail()
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_have_the_environment_of_their_start(two: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the server that they are forks of was started before."""
    list(two.spread(os.getenv, ["PATH"]))
    monkeypatch.setenv("RANKPILOT_TESTED", "yes")
    with worker_pool(2) as workers:
        assert list(workers.spread(os.getenv, ["RANKPILOT_TESTED"])) == [("RANKPILOT_TESTED", "yes")]


# Objects that live in a process ---------------------------------------------------------------------------------------


class Tally:
    """Adds up numbers, and remembers where it lives."""

    def __init__(self, start: float) -> None:
        if start < 0:
            raise Broken(f"no tally starts at {start}")
        self.total = start

    def hang_once(self, number: float, path: Path) -> tuple[float, int]:
        """Add; the first process to do so goes on for longer than anybody waits."""
        if not path.exists():
            path.touch()
            time.sleep(60)
        return self.add(number)

    def add(self, number: float) -> tuple[float, int]:
        if number < 0:
            raise Broken("a tally never falls")
        self.total += number
        return self.total, os.getpid()

    def restart(self, total: float) -> float:
        self.total = total
        return total

    def mark(self, path: Path) -> int:
        """Leave a trace of each time that this is called."""
        with path.open("a") as file:
            file.write("x")
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def totals(results: dict[int, tuple[float, int]]) -> dict[int, float]:
    return {key: total for key, (total, _) in results.items()}


def test_objects_keep_what_they_have_learned(workers: Workers) -> None:
    for key in range(3):
        workers.keep(key, partial(Tally, 10.0 * key))
    for turn in range(1, 4):
        results = workers.call({key: Call(Tally.add, (1.0,)) for key in (2, 0, 1)})
        assert list(results) == [2, 0, 1]
        assert totals(results) == {2: 20.0 + turn, 0: 0.0 + turn, 1: 10.0 + turn}
    workers.keep(1, partial(Tally, 100.0))
    assert totals(workers.call({1: Call(Tally.add, (1.0,))})) == {1: 101.0}
    assert totals(workers.call({0: Call(Tally.add, (1.0,))})) == {0: 4.0}, "the others are as they were"


def test_what_objects_raise_is_raised(workers: Workers) -> None:
    workers.keep(0, partial(Tally, 0.0))
    workers.keep(1, partial(Tally, -1.0))
    with pytest.raises(Broken, match="never falls"):
        workers.call({0: Call(Tally.add, (-1.0,))})
    for _ in range(2):
        with pytest.raises(Broken, match="no tally starts at"):
            workers.call({1: Call(Tally.add, (1.0,))})
    assert totals(workers.call({0: Call(Tally.add, (1.0,))})) == {0: 1.0}


# Processes that die ---------------------------------------------------------------------------------------------------


def test_another_process_takes_the_place_of_one_that_died_idle(two: Workers) -> None:
    for key in (0, 2):
        two.keep(key, partial(Tally, float(key)))
    first = two.call({key: Call(Tally.add, (0.1,)) for key in (0, 2)})
    two.call({0: Call(Tally.add, (0.2,))})
    home = first[0][1]
    os.kill(home, signal.SIGKILL)
    results = two.call({key: Call(Tally.add, (0.3,)) for key in (0, 2)})
    assert totals(results) == {0: 0.0 + 0.1 + 0.2 + 0.3, 2: 2.0 + 0.1 + 0.3}, "to the last bit"
    assert {pid for _, pid in results.values()} != {home}


def test_a_call_that_is_interrupted_is_made_again(two: Workers, tmp_path: Path) -> None:
    two.keep(0, partial(Tally, 0.0))
    home = two.call({0: Call(Tally.add, (0.1,))})[0][1]
    Thread(target=_kill_when, args=(home, tmp_path / "began")).start()
    total, pid = two.call({0: Call(Tally.hang_once, (0.2, tmp_path / "began"))})[0]
    assert (total, pid != home) == (0.1 + 0.2, True)


def _kill_when(process: int, path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)


def test_calls_before_a_new_beginning_are_not_repeated(two: Workers, tmp_path: Path) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    two.keep(0, partial(Tally, 0.0))
    home = two.call({0: Call(Tally.mark, (early,))})[0]
    two.call({0: Call(Tally.restart, (50.0,), anew=True)})
    two.call({0: Call(Tally.mark, (late,))})
    os.kill(home, signal.SIGKILL)
    assert totals(two.call({0: Call(Tally.add, (1.0,))})) == {0: 51.0}
    assert (early.read_text(), late.read_text()) == ("x", "xx")


def test_a_piece_whose_process_dies_is_done_again(tmp_path: Path) -> None:
    """One in its middle, and one while it answers with more than a pipe holds: nobody waits for the rest of it."""
    with worker_pool(2) as workers:
        done = dict(workers.spread(_die_once, [str(tmp_path / name) for name in ("early", "late")]))
    assert list(done.values()) == [b"whole", b"whole"]


def _die_once(path: str) -> Any:
    """The first process that comes along dies; late, when it has sent only the length of its answer."""
    if Path(path).exists():
        return b"whole"
    Path(path).touch()
    if path.endswith("early"):
        os.kill(os.getpid(), signal.SIGKILL)

    def send(connection: Connection, content: bytes) -> None:
        os.write(connection.fileno(), content)
        os._exit(1)

    Connection._send = send  # type: ignore[attr-defined]
    return bytes(2**20)


def _die(name: str) -> None:
    os._exit(1)


def test_work_that_kills_its_process_each_time_is_given_up() -> None:
    with worker_pool(2) as workers:
        message = rf"ended {MOST_DEATHS} times at the same work, .*: the piece called b\. Try fewer workers"
        with pytest.raises(WorkerError, match=message):
            list(workers.spread(_die, ["b"], lambda piece: f"the piece called {piece}"))
        workers.keep(0, partial(Tally, 1.0))
        workers.keep(1, partial(Tally, 1.0))
        with pytest.raises(WorkerError, match="perhaps: stack 7 of round 3"):
            workers.call({0: Call(Tally.die, (), "stack 7 of round 3"), 1: Call(Tally.add, (1.0,))})
        assert totals(workers.call({0: Call(Tally.add, (1.0,))})) == {0: 2.0}, "other work goes on"


def test_a_process_that_is_sent_more_than_a_pipe_holds_can_be_ended() -> None:
    with worker_pool(2) as workers:
        waiting = workers.spread(_sleep_with, [(0.0, b""), (60.0, bytes(2**24))], lambda piece: f"{piece[0]} s")
        assert next(waiting)[1] == 0.0  # the other one has not read its piece yet, or sleeps


def _sleep_with(piece: tuple[float, bytes]) -> float:
    time.sleep(piece[0])
    return piece[0]


_SCRIPT = """
import os, time
from multiprocessing.connection import Connection
from operator import call
from rankpilot.common.workers import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as workers:
        for _, pid in workers.spread(call, [os.getpid, os.getpid]):
            print(pid, flush=True)
        next(workers.spread(time.sleep, [100.0, 100.0]))
"""


@pytest.mark.long
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """In the middle of a piece of work, too: nobody would read its result."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(2)}
        parent.kill()
        parent.wait()
        end = time.monotonic() + 30
        while any(map(_runs, workers)) and time.monotonic() < end:
            time.sleep(0.1)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    try:
        return str(psutil.Process(pid).status()) != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
