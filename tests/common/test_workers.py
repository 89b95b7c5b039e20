"""Work spread over processes."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children
from operator import call
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rankpilot.common.workers import Spread, isolated, worker_pool


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def two() -> Iterator[Spread[Any, Any]]:
    """Two processes; they take a while to start."""
    with worker_pool(2) as spread:
        yield spread


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_results_do_not_depend_on_the_number_of_workers(two: Spread[Any, Any]) -> None:
    pieces = [5, 3, 20, 3, 0]
    with worker_pool(1) as one:
        alone = list(one(math.factorial, pieces))
    assert alone == [(piece, math.factorial(piece)) for piece in pieces]
    assert sorted(two(math.factorial, pieces)) == sorted(alone)


def test_there_may_be_nothing_to_do(two: Spread[Any, Any]) -> None:
    with worker_pool(1) as one:
        assert list(one(math.sqrt, [])) == list(two(math.sqrt, [])) == []


def test_errors_in_a_worker_are_raised(two: Spread[Any, Any]) -> None:
    with worker_pool(1) as one:
        for spread in (one, two):
            with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
                list(spread(math.sqrt, [-1.0]))
    assert list(two(math.sqrt, [4.0])) == [(4.0, 2.0)], "the processes go on"


def test_processes_end_with_the_pool() -> None:
    before = set(active_children())
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"), worker_pool(2) as spread:
        list(spread(math.sqrt, [-1.0]))
    assert set(active_children()) <= before


def test_one_worker_works_when_it_is_asked() -> None:
    done: list[int] = []
    with worker_pool(1) as spread:
        results = spread(done.append, [1, 2, 3])
        assert next(results) == (1, None)
        assert done == [1]
        list(results)
    assert done == [1, 2, 3]


def test_one_worker_leaves_the_random_state_as_it_was() -> None:
    before = torch.get_rng_state()
    with worker_pool(1) as spread:
        drawn = [result for _, result in spread(torch.rand, [3, 3])]
        assert torch.equal(torch.get_rng_state(), before), "also between pieces"
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn), "pieces do not depend on those before them"


@pytest.mark.usefixtures("two_threads")
def test_each_worker_has_one_thread(two: Spread[Any, Any]) -> None:
    with worker_pool(1) as one:
        for spread in (one, two):
            for _, threads in spread(call, [torch.get_num_threads] * 3):
                assert threads == 1
                assert torch.get_num_threads() == 2, "and this process as many as before"


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


_SCRIPT = """
import os, time
from operator import call
from rankpilot.agents.pool import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as spread:
        for _, pid in spread(call, [os.getpid, os.getpid]):
            print(pid, flush=True)
        next(spread(time.sleep, [100.0, 100.0]))
"""


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
