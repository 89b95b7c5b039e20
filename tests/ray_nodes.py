"""A Ray cluster on this machine, whose nodes come and go."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any, Self

import psutil

SIZE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""How soon Ray notices that a node is gone."""


_KEPT: list[Any] = []
"""All nodes of this process. Hooks at its exit hold them, which Python 3.13 lets go of in a fork, and a client of Ray
that is freed in a fork takes that with it."""


class Nodes:
    """A head without CPUs, and nodes of one CPU each.

    Args:
        count: nodes at the start.
    """

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        # A node that is started from this process handles its signals from then on.
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        head = {**SIZE, "num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        _KEPT.append(self._cluster.head_node)
        self.nodes = [self.add() for _ in range(count)]
        self.address: str = self._cluster.address
        self._restore_signals()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()
        self._restore_signals()

    def add(self, **variables: str) -> Any:
        """A node whose workers have these environment variables too."""
        node = self._cluster.add_node(**SIZE, env_vars={"RAY_worker_niceness": "0", **variables})
        _KEPT.append(node)
        self._restore_signals()
        return node

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def remove(self, node: Any) -> None:
        """As if its machine had lost power: Ray's own process and all workers there end at once."""
        workers = _children(node)
        self._cluster.remove_node(node, allow_graceful=False)
        _kill(workers)

    def kill_actors(self, node: Any) -> int:
        """Kill the actors of a node, which itself goes on; returns how many there were."""
        return _kill([process for process in _children(node) if "Actor" in " ".join(process.cmdline())])

    def settle(self) -> None:
        """Wait until Ray has noticed which nodes are gone."""
        self._cluster.wait_for_nodes(timeout=120)


def _children(node: Any) -> list[psutil.Process]:
    return psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)


def _kill(processes: list[psutil.Process]) -> int:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(processes)
