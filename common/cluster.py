"""Worker processes on the machines of a Ray cluster: all that knows Ray.

Each worker is an actor that takes one CPU of the cluster. `common.workers` gives it one thing to do at a time, keeps
objects and repeats calls as with a process of this machine; a cluster only tells where a process starts, and notices
that one has died. An actor writes no files. To load the libraries takes an actor seconds, so one whose work is done
waits for the next.

Machines of different kinds may round differently. So each node first runs a *canary*, a small fixed piece of work, and
takes part only if the result is the one that this machine finds.
"""

import os
import pickle
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import current_thread, main_thread
from typing import Any

from ..errors import ConfigError, UnsupportedError, WorkerError, first_line
from .text import plural
from .workers import ELSEWHERE, OBJECTS, Call, isolated, perform

LOCAL, AUTO = "local", "auto"
"""Addresses of a cluster that is started on this machine, and of the one that runs here."""

CANARY_SECONDS = 180.0
"""A node that has not answered by then takes no part: its CPUs are taken by others, or it is out of reach."""

SHUNNED_SECONDS = 60.0
"""After a process died on a node, others start elsewhere for so long: Ray takes time to notice that a node is gone."""

CONNECT_SECONDS = 10.0
"""A cluster answers within that time; Ray itself would try for many minutes."""


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
    ray = _connected(address)
    before = ELSEWHERE.get()
    try:
        cluster = _Cluster(ray, canary, tell)
        nodes = cluster.nodes()
        if not nodes:
            what = f"No node of the cluster at {address!r} can take part."
            raise ConfigError(f"{what} Start one that can, or leave out --cluster.")
        tell(f"On the cluster: {plural(len(nodes), 'node')} with {sum(node.cpus for node in nodes)} CPUs.")
        ELSEWHERE.set(cluster)
        yield
    finally:
        ELSEWHERE.set(before)
        ray.shutdown()


def _connected(address: str) -> Any:
    """Ray, connected to a cluster, or to one that it starts; signals do afterwards what they did before."""
    # No reports of its use to its makers, nor a warning of what it will do later; and processes of a cluster that is
    # started here run at this one's priority: at Ray's low one other work starves them.
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness"):
        os.environ.setdefault(name, "0")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError("Working on a cluster needs Ray: pip install 'rankpilot[cluster]'.") from error
    _check_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        needs = "the same versions of Python and Ray, and know its token if it has one (docs/cluster.md)"
        trouble = f"The cluster at {address!r} cannot be joined: {first_line(error)}"
        raise ConfigError(f"{trouble}. This machine must be part of it, with {needs}.") from error
    if current_thread() is main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ray


def _check_address(address: str) -> None:
    """Refuse what is no address, and an address at which nothing answers."""
    if address in (LOCAL, AUTO):
        return
    if not re.fullmatch(r"[^\s:/]+:\d{1,5}", address):
        allowed = f"{LOCAL!r}, {AUTO!r} or HOST:PORT of a Ray cluster that this machine is part of"
        raise ConfigError(f"--cluster is {allowed}; got {address!r}.")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        start = f"Start a cluster there: ray start --head --port {port}."
        raise ConfigError(f"Nothing answers at {address} ({error}). {start}") from error


@dataclass(eq=False)
class _Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        cpus: processes that it has room for.
        busy: processes that run there.
        idle: actors whose work is done.
        shunned: until when no process should start there, on the clock of `time.monotonic`.
    """

    id: str
    cpus: int
    busy: int = 0
    idle: list[Any] = field(default_factory=list)
    shunned: float = 0.0


class _Cluster:
    """The nodes of a cluster whose bits are those of this machine; see `Machines`, and `running_on_cluster`."""

    def __init__(self, ray: Any, canary: Callable[[], str], tell: Callable[[str], None]) -> None:
        self._ray, self._canary, self._tell = ray, canary, tell
        self._known: dict[str, _Node | None] = {}  # None: it is left out
        with isolated():
            self._expected = canary()

    def size(self) -> int:
        return sum(node.cpus for node in self.nodes())

    def start(self) -> Executor:
        """Start a process on the node with the most room, or take one that has no work there; they may share a CPU.

        Raises:
            WorkerError: no node is left.
        """
        if not (nodes := self.nodes()):
            what = "No node of the cluster is left that can take part."
            raise WorkerError(f"{what} Go on with --resume when there is one.")
        now = time.monotonic()
        return _RayProcess(self._ray, min(nodes, key=lambda each: (now < each.shunned, each.busy / each.cpus)))

    def nodes(self) -> list[_Node]:
        """Nodes that live, as Ray knows it, have CPUs, and take part; new ones are tried first."""
        cards = {card["NodeID"]: card for card in self._ray.nodes() if card["Alive"] and card["Resources"].get("CPU")}
        new = [_Node(key, int(card["Resources"]["CPU"])) for key, card in cards.items() if key not in self._known]
        processes = [_RayProcess(self._ray, node) for node in new]
        answers = [process.submit(perform, Call(self._canary), None, None, []) for process in processes]
        wait(answers, timeout=CANARY_SECONDS)
        for node, process, answer in zip(new, processes, answers, strict=True):
            process.shutdown()
            trouble = self._trouble(answer)
            self._known[node.id] = None if trouble else node
            if trouble:
                name = f"{cards[node.id]['NodeManagerAddress']} ({node.id[:8]})"
                self._tell(f"Node {name} is left out: {trouble}.")
        return [node for key, node in self._known.items() if node and key in cards]

    def _trouble(self, answer: Future[str]) -> str:
        """Why a node cannot take part, by the answer of its canary; empty if it can."""
        if not answer.done():
            return f"it gave no answer within {CANARY_SECONDS:.0f} seconds"
        if isinstance(error := answer.exception(), Exception):
            return f"the canary does not run there ({type(error).__name__}: {first_line(error)})"
        bits = f"({answer.result()}, here {self._expected})"
        return "" if answer.result() == self._expected else f"its bits differ from this machine's {bits}"


class _RayProcess(Executor):
    """A process on a node: an actor that has no work there, or a new one."""

    def __init__(self, ray: Any, node: _Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._node, self._answer = ray, node, Future[Any]()
        # Beyond its CPUs a node takes the workers of nodes that are gone: to wait for a CPU might be to wait for ever.
        cpus, where = int(node.busy < node.cpus), NodeAffinitySchedulingStrategy(node.id, soft=False)
        actor = ray.remote(_Actor).options(num_cpus=cpus, scheduling_strategy=where)
        self._actor = node.idle.pop() if node.idle else actor.remote()
        node.busy += 1

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        answer = self._answer = Future[Any]()

        def arrive(reply: Future[bytes]) -> None:
            try:
                answer.set_result(pickle.loads(reply.result()))  # noqa: S301 - as from a process of this machine
            except self._ray.exceptions.RayTaskError as error:  # the work's own
                answer.set_exception(error.cause)
            except self._ray.exceptions.RayError as error:  # the actor, its node or its answer is gone
                self._node.shunned = time.monotonic() + SHUNNED_SECONDS
                self._node.idle.clear()  # Ray ends actors that nobody refers to
                answer.set_exception(BrokenExecutor(first_line(error)))
            except Exception as error:
                answer.set_exception(error)

        content = pickle.dumps((function, arguments, named))
        self._actor.run.remote(content).future().add_done_callback(arrive)
        return answer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the actor, or let it wait for more work if its own is done; it forgets what it had."""
        self._node.busy -= 1
        if self._answer.done() and not self._answer.exception():
            self._actor.forget.remote()
            self._node.idle.append(self._actor)
        else:
            self._ray.kill(self._actor)


class _Actor:
    """What an actor is; it gets and sends bytes, since Ray would hand out arrays that cannot be written to."""

    def run(self, content: bytes) -> bytes:
        function, arguments, named = pickle.loads(content)  # noqa: S301 - from this run
        return pickle.dumps(function(*arguments, **named))

    def forget(self) -> None:
        OBJECTS.clear()
