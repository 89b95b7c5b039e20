"""Worker processes on the machines of a Ray cluster: all that knows Ray.

Each worker is an actor that takes one CPU of the cluster. It answers the requests that a process of this machine would
answer, one at a time, so `common.workers` spreads pieces, keeps objects and repeats calls just the same; a cluster only
tells where a process starts, and notices that one has died. An actor writes no files, and it is never handed more than
it can do next. To load the libraries takes an actor seconds, so one whose work is done waits for the next.

Machines of different kinds may round differently. So each node first runs a *canary*, a small fixed piece of work, and
takes part only if the result is the one that this machine finds.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import current_thread, main_thread
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError, WorkerError, first_line
from .units import plural
from .worker_process import Request, answered, isolated, not_sent
from .workers import running_on

LOCAL, AUTO = "local", "auto"
"""Addresses of a cluster that is started on this machine, and of the one that runs here."""

CANARY_SECONDS = 180.0
"""A node that has not answered by then takes no part: its CPUs are taken by others, or it is out of reach."""

SHUNNED_SECONDS = 60.0
"""After a process died on a node, others start elsewhere for so long: Ray takes time to notice that a node is gone."""

CONNECT_SECONDS = 10.0
"""A cluster answers within that time; Ray itself would try for many minutes."""


@dataclass(eq=False)
class _Node:
    """A machine of the cluster that takes part.

    Attributes:
        id: Ray's.
        name: its address and the start of its id, for people.
        cpus: processes that it has room for.
        busy: processes that run there.
        shunned: until when no process should start there, on the clock of `time.monotonic`.
    """

    id: str
    name: str
    cpus: int
    busy: int = 0
    shunned: float = 0.0


@contextmanager
def running_on_cluster(
    address: str, canary: Callable[[], str], tell: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Let all workers that are made inside the block be processes of a Ray cluster.

    Args:
        address: "local" starts a cluster on this machine, and ends it with the block; "auto" joins the one that runs on
            this machine, and HOST:PORT the one with that address, of which this machine must be a part.
        canary: a small fixed piece of work whose result tells the bits of a machine; pickled by its name.
        tell: called with a line for people: what takes part, and each node that does not.

    Raises:
        UnsupportedError: Ray is not installed.
        ConfigError: no address, no cluster there, or none of its nodes can take part.
    """
    ray = _ray()
    with _connection(ray, address):
        cluster = Cluster(ray, canary, tell)
        nodes, workers = len(cluster.nodes), cluster.size()
        if not workers:
            raise ConfigError(
                f"No node of the cluster at {address!r} can take part. Start one that can, or leave out --cluster."
            )
        tell(f"On the cluster: {plural(nodes, 'node')} with {workers} CPUs.")
        with running_on(cluster):
            yield


class Cluster:
    """The nodes of a cluster whose bits are those of this machine; see `Machines`.

    Args:
        ray: the module, connected.
        canary: see `running_on_cluster`.
        tell: see `running_on_cluster`.

    Attributes:
        nodes: those that take part, by Ray's id.
    """

    def __init__(self, ray: Any, canary: Callable[[], str], tell: Callable[[str], None]) -> None:
        self._ray, self._canary, self._tell = ray, canary, tell
        self._known: set[str] = set()
        self._idle: list[_ActorProcess] = []
        self.nodes: dict[str, _Node] = {}
        with isolated():
            self._expected = canary()
        self._look()

    def size(self) -> int:
        """The CPUs of all nodes that take part; nodes that have joined since are tried first."""
        self._look()
        return sum(node.cpus for node in self.nodes.values())

    def start(self) -> _ActorProcess:
        """Start a process on the node with the most room, or take one that has no work there; they may share a CPU.

        Raises:
            WorkerError: no node is left.
        """
        self._forget(self._alive())
        if not self.nodes:
            self._look()
        if not self.nodes:
            raise WorkerError(
                "No node of the cluster is left that can take part. Go on with --resume when there is one."
            )
        now = time.monotonic()
        node = min(self.nodes.values(), key=lambda each: (now < each.shunned, each.busy / each.cpus))
        for process in [each for each in self._idle if each.node is node]:
            self._idle.remove(process)
            if process.goes_on():
                return process
        return _ActorProcess(self._ray, node, self._idle)

    def ready(self, processes: Sequence[_ActorProcess]) -> Sequence[_ActorProcess]:
        """See `Machines`."""
        ready, _ = self._ray.wait([process.reply for process in processes], num_returns=1)
        return [process for process in processes if process.reply in ready]

    def _alive(self) -> dict[str, _Node]:
        """Nodes that live, as Ray knows it, and that have CPUs."""
        cards = [card for card in self._ray.nodes() if card["Alive"]]
        nodes = [
            _Node(
                card["NodeID"],
                f"{card['NodeManagerAddress']} ({card['NodeID'][:8]})",
                int(card["Resources"].get("CPU", 0)),
            )
            for card in cards
        ]
        return {node.id: node for node in nodes if node.cpus}

    def _forget(self, alive: dict[str, _Node]) -> None:
        """Drop nodes that are gone, with their processes."""
        self.nodes = {key: node for key, node in self.nodes.items() if key in alive}
        self._idle[:] = [process for process in self._idle if process.node.id in self.nodes]

    def _look(self) -> None:
        """Drop nodes that are gone, and try those that are new."""
        alive = self._alive()
        self._forget(alive)
        new = [node for key, node in alive.items() if key not in self._known]
        self._known.update(node.id for node in new)
        canaries = {node.id: _ActorProcess(self._ray, node, self._idle) for node in new}
        end = time.monotonic() + CANARY_SECONDS
        for process in canaries.values():
            process.send(Request(None, self._canary))
        for node in new:
            process = canaries[node.id]
            done, _ = self._ray.wait([process.reply], timeout=max(0.0, end - time.monotonic()))
            trouble = self._trouble(process) if done else f"it gave no answer within {CANARY_SECONDS:.0f} seconds"
            process.end(idle=not trouble)
            if trouble:
                self._tell(f"Node {node.name} is left out: {trouble}.")
            else:
                self.nodes[node.id] = node

    def _trouble(self, process: _ActorProcess) -> str:
        """Why a node whose canary has come back cannot take part; empty if it can."""
        try:
            succeeded, found = process.receive()
        except ConnectionError as error:
            return f"no worker starts there ({first_line(error)})"
        if not succeeded:
            return f"its canary failed ({type(found).__name__}: {first_line(found)})"
        return (
            "" if found == self._expected else f"its bits differ from this machine's ({found}, here {self._expected})"
        )


class _ActorProcess:
    """A process of a cluster; see `Process`.

    Args:
        ray: the module, connected.
        node: where it runs.
        idle: where it waits for more work when its own is done.

    Attributes:
        node: where it runs.
        reply: Ray's reference to the latest answer.
    """

    def __init__(self, ray: Any, node: _Node, idle: list[_ActorProcess]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self.node, self._idle = ray, node, idle
        # Beyond its CPUs a node takes the workers of nodes that are gone: to wait for a CPU might be to wait for ever.
        options = {"num_cpus": int(node.busy < node.cpus), "max_restarts": 0, "max_task_retries": 0}
        where = NodeAffinitySchedulingStrategy(node.id, soft=False)
        self._actor = ray.remote(_Actor).options(**options, scheduling_strategy=where).remote()
        node.busy += 1
        self.reply: Any = None

    def send(self, request: Request) -> None:
        """See `Process`; what it needs is pickled here, so that mistakes are those of a pipe."""
        self.reply = self._actor.answer.remote(_pickled(request))

    def receive(self) -> tuple[bool, Any]:
        """See `Process`."""
        try:
            reply = self._ray.get(self.reply)
        except self._ray.exceptions.RayError as error:  # the actor, its node or its answer is gone
            self.node.shunned = time.monotonic() + SHUNNED_SECONDS
            raise ConnectionError(first_line(error)) from error
        succeeded, result = _unpickled(reply)
        return succeeded, result

    def end(self, *, idle: bool) -> None:
        """See `Process`; one that is idle forgets what it has, and waits."""
        self.node.busy -= 1
        if idle:
            self._actor.forget.remote()
            self._idle.append(self)
        else:
            self._ray.kill(self._actor)

    def goes_on(self) -> bool:
        """Give a process that has waited work again; whether it still lives."""
        try:
            self._ray.get(self._actor.forget.remote())
        except self._ray.exceptions.RayError:
            return False
        self.node.busy += 1
        return True


class _Actor:
    """What answers requests on a node; replies are bytes, since Ray would hand out arrays that cannot be written to."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._objects: dict[int, Any] = {}

    def answer(self, request: bytes) -> bytes:
        """Answer a request."""
        try:
            reply = answered(_unpickled(request), self._objects)
        except Exception as error:  # the request names something that is not there
            reply = False, error
        try:
            return _pickled(reply)
        except Exception as error:
            return _pickled(not_sent(error))

    def forget(self) -> None:
        """Drop all objects."""
        self._objects.clear()


def _pickled(value: Any) -> bytes:
    from ray import cloudpickle

    return bytes(cloudpickle.dumps(value))


def _unpickled(content: bytes) -> Any:
    """What another process of this run has sent; as with a pipe, whoever is in the cluster is trusted."""
    from ray import cloudpickle

    return cloudpickle.loads(content)


# Ray itself -----------------------------------------------------------------------------------------------------------


def _ray() -> Any:
    """Ray, quiet about itself, and without reports of its use to its makers unless the user wants them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what it warns that it will do later
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster that is started here: at 15 other work starves it
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError("Working on a cluster needs Ray: pip install 'rankpilot[cluster]'.") from error
    return ray


@contextmanager
def _connection(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster, or start one; signals do afterwards what they did before."""
    _check_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=address,
            namespace="rankpilot",
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The cluster at {address!r} cannot be joined: {first_line(error)}. This machine must be part of it, with "
            "the same versions of Python and Ray, and know its token if it has one (docs/cluster.md)."
        ) from error
    try:
        if current_thread() is main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse what is no address, and an address at which nothing answers."""
    if address in (LOCAL, AUTO):
        return
    if not re.fullmatch(r"[^\s:/]+:\d{1,5}", address):
        raise ConfigError(
            f"--cluster is {LOCAL!r}, {AUTO!r} or HOST:PORT of a Ray cluster that this machine is part of; got "
            f"{address!r}."
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Nothing answers at {address} ({error}). Start a cluster there: ray start --head --port {port}."
        ) from error
