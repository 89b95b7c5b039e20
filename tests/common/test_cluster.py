"""Workers on a Ray cluster of two nodes: the same results, also when actors and nodes die; which nodes take part."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import call
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rankpilot.common.cluster import running_on_cluster
from rankpilot.common.worker_process import MOST_DEATHS
from rankpilot.common.workers import Call, Workers, count_workers, worker_pool
from rankpilot.errors import ConfigError, UnsupportedError, WorkerError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SIZE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


class Nodes:
    """A cluster of one head without CPUs, and nodes that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
        head = {**SIZE, "num_cpus": 0, "include_dashboard": False, "_system_config": quick}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self.cluster.address

    def add(self, **variables: str) -> Any:
        return self.cluster.add_node(**SIZE, env_vars=variables)

    def remove(self, node: Any) -> None:
        """As if its machine had lost power: Ray's own process and all workers there end at once."""
        workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        self.cluster.remove_node(node, allow_graceful=False)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def settle(self) -> None:
        """Wait until Ray has noticed which nodes are gone."""
        self.cluster.wait_for_nodes(timeout=120)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    nodes = Nodes()
    nodes.add()
    nodes.add()
    yield nodes
    nodes.cluster.shutdown()


def canary() -> str:
    return os.environ.get("ODD_BITS", "even")


@contextmanager
def on(nodes: Nodes) -> Iterator[list[str]]:
    lines: list[str] = []
    with running_on_cluster(nodes.address, canary, lines.append):
        yield lines


class Tally:
    """Adds up numbers, and remembers where it lives."""

    def __init__(self, start: float) -> None:
        self.total = start

    def add(self, number: float, seconds: float = 0.0) -> tuple[float, int]:
        time.sleep(seconds)
        self.total += number
        return self.total, os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def numbers(count: int) -> np.ndarray:
    return np.zeros(count)


def place(_: int) -> tuple[int, str]:
    """Which process works, and on which node."""
    import ray

    time.sleep(0.2)
    return torch.get_num_threads(), ray.get_runtime_context().get_node_id()


def test_pieces_and_objects_on_two_nodes(nodes: Nodes) -> None:
    with on(nodes) as lines:
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


def test_one_worker_is_an_actor_too(nodes: Nodes) -> None:
    with on(nodes), worker_pool(1) as workers:
        assert [pid != os.getpid() for _, pid in workers.spread(call, [os.getpid])] == [True]


def test_work_that_kills_each_actor_is_given_up(nodes: Nodes) -> None:
    with on(nodes), worker_pool(2) as workers:
        workers.keep(0, partial(Tally, 1.0))
        with pytest.raises(WorkerError, match=rf"ended {MOST_DEATHS} times at the same work, .*: stack 7 of round 3"):
            workers.call({0: Call(Tally.die, (), "stack 7 of round 3")})
        assert workers.call({0: Call(Tally.add, (1.0,))})[0][0] == 2.0, "other work goes on"


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


def _wait_for(path: Path, piece: int) -> int:
    while not path.exists():
        time.sleep(0.05)
    return piece


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


def test_no_node_can_take_part(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_BITS", "odd here")
    with pytest.raises(ConfigError, match=r"No node of the cluster at .* can take part"), on(nodes):
        pass
    with worker_pool(1) as workers:
        assert list(workers.spread(call, [os.getpid])) == [(os.getpid, os.getpid())], "later work is done here again"


def test_signals_are_as_they_were(nodes: Nodes) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with on(nodes):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("address", ["", "ray://head:10001", "head", "head:x"])
def test_addresses(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="'local', 'auto' or HOST:PORT"), running_on_cluster(address, canary):
        pass


def test_nothing_at_an_address() -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(ConfigError, match=r"Nothing answers at 127\.0\.0\.1:1 .* ray start --head --port 1"),
        running_on_cluster("127.0.0.1:1", canary),
    ):
        pass


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UnsupportedError, match=r"pip install 'rankpilot\[cluster\]'"),
        running_on_cluster("local", canary),
    ):
        pass
