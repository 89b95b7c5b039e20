"""Workers on a Ray cluster of two nodes: the same results, also when actors and nodes die; which nodes take part."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import call
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.cluster import running_on_cluster
from rankpilot.common.workers import MOST_DEATHS, Call, Workers, count_workers, worker_pool
from rankpilot.errors import ConfigError, UnsupportedError, WorkerError

from ..ray_nodes import Nodes
from .test_workers import Tally

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    with Nodes(2) as nodes:
        yield nodes


def canary() -> str:
    return os.environ.get("ODD_BITS", "even")


@contextmanager
def on(nodes: Nodes) -> Iterator[list[str]]:
    lines: list[str] = []
    with running_on_cluster(nodes.address, canary, lines.append):
        yield lines


def numbers(count: int) -> np.ndarray:
    return np.zeros(count)


def place(_: int) -> tuple[int, str]:
    """Which process works, and on which node."""
    import ray

    time.sleep(0.2)
    return torch.get_num_threads(), ray.get_runtime_context().get_node_id()


def signals() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.long
def test_pieces_and_objects_on_two_nodes(nodes: Nodes) -> None:
    before = signals()
    with on(nodes) as lines:
        assert signals() == before, "they are as they were"
        assert lines == ["On the cluster: 2 nodes with 2 CPUs."]
        assert count_workers(0) == 2
        with worker_pool(2) as workers:
            pieces = [5, 3, 20, 3, 0]
            assert sorted(workers.spread(math.factorial, pieces)) == [(n, math.factorial(n)) for n in sorted(pieces)]
            found = [result for _, result in workers.spread(place, range(6))]
            assert {threads for threads, _ in found} == {1}
            assert len({node for _, node in found}) == 2, "both nodes work"
            for _, result in workers.spread(numbers, [3, 10**6]):
                result += 1.0  # an array that Ray keeps cannot be written to
            with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
                list(workers.spread(math.sqrt, [-1.0]))
            check_objects(workers)
        with worker_pool(1) as workers:
            assert [pid != os.getpid() for _, pid in workers.spread(call, [os.getpid])] == [True], "an actor too"
    assert signals() == before


def check_objects(workers: Workers) -> None:
    """Objects keep what they have learned, also when their actor dies, in a call or between two."""
    for key in range(3):
        workers.keep(key, partial(Tally, float(key)))
    first = workers.call({key: Call(Tally.add, (0.1,)) for key in (0, 1, 2)})
    assert first[0][1] != first[1][1] != os.getpid()
    os.kill(first[0][1], signal.SIGKILL)
    second = workers.call({key: Call(Tally.add, (0.2,)) for key in (0, 1, 2)})
    assert {key: total for key, (total, _) in second.items()} == {key: key + 0.1 + 0.2 for key in range(3)}
    assert second[0][1] != first[0][1]
    assert second[1][1] == first[1][1], "the other actor goes on"


@pytest.mark.long
def test_work_that_kills_each_actor_is_given_up(nodes: Nodes) -> None:
    with on(nodes), worker_pool(2) as workers:
        workers.keep(0, partial(Tally, 1.0))
        with pytest.raises(WorkerError, match=rf"ended {MOST_DEATHS} times at the same work, .*: stack 7 of round 3"):
            workers.call({0: Call(Tally.die, (), "stack 7 of round 3")})
        assert workers.call({0: Call(Tally.add, (1.0,))})[0][0] == 2.0, "other work goes on"


@pytest.mark.long
def test_the_work_of_a_node_that_is_lost_is_done_again(nodes: Nodes, tmp_path: Path) -> None:
    third = nodes.add()
    with on(nodes) as lines, worker_pool(3) as workers:
        assert lines == ["On the cluster: 3 nodes with 3 CPUs."]
        for key in range(3):
            workers.keep(key, partial(Tally, float(key)))
        before = workers.call({key: Call(Tally.add, (0.1,)) for key in range(3)})

        def lose() -> None:
            nodes.remove(third)
            (tmp_path / "gone").touch()

        results = workers.spread(partial(_wait_for, tmp_path / "gone"), range(6))
        Timer(1.0, lose).start()
        assert sorted(piece for piece, _ in results) == list(range(6))
        after = workers.call({key: Call(Tally.add, (0.2,)) for key in range(3)})
        assert [after[key][0] for key in range(3)] == [key + 0.1 + 0.2 for key in range(3)]
        assert sum(before[key][1] != after[key][1] for key in range(3)) == 1, "the other nodes' objects stay"
        nodes.settle()
        assert count_workers(0) == 2
        fourth = nodes.add()
        assert count_workers(0) == 3, "a node that joins later is of use"
    nodes.remove(fourth)
    nodes.settle()


def _wait_for(path: Path, piece: int) -> int:
    while not path.exists():
        time.sleep(0.05)
    return piece


@pytest.mark.long
def test_a_node_with_other_bits_is_left_out(nodes: Nodes) -> None:
    odd = nodes.add(ODD_BITS="odd")
    try:
        with on(nodes) as lines, worker_pool(3) as workers:
            assert len(lines) == 2
            assert lines[0].startswith("Node ")
            assert lines[0].endswith(" is left out: its bits differ from this machine's (odd, here even).")
            assert lines[1] == "On the cluster: 2 nodes with 2 CPUs."
            assert not any(odd for _, odd in workers.spread(os.getenv, ["ODD_BITS"] * 6))
    finally:
        nodes.remove(odd)
        nodes.settle()


@pytest.mark.long
def test_no_node_can_take_part(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_BITS", "odd here")
    with pytest.raises(ConfigError, match=r"No node of the cluster at .* can take part"), on(nodes):
        pass
    with worker_pool(1) as workers:
        assert list(workers.spread(call, [os.getpid])) == [(os.getpid, os.getpid())], "later work is done here again"


FORMS = "'local', 'auto' or HOST:PORT"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        *((wrong, FORMS) for wrong in ("", "ray://head:10001", "head", "head:x")),
        ("127.0.0.1:1", r"Nothing answers at 127\.0\.0\.1:1 .* ray start --head --port 1"),
    ],
)
def test_addresses(address: str, message: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=message), running_on_cluster(address, canary):
        pass


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = r"pip install 'rankpilot\[cluster\]'"
    with pytest.raises(UnsupportedError, match=words), running_on_cluster("local", canary):
        pass
