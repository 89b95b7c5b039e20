"""Runs a function in several processes at once, as torchrun would: forks of this one, joined by gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

PATIENCE_S = 120
FORK = multiprocessing.get_context("fork")


class ProcessFailed(Exception):
    """What a process raised: its number, and the error's text with its traceback."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        super().__init__("\n".join(f"process {rank}: {trace}" for rank, (_, _, trace) in errors.items()))
        self.kinds = {rank: kind for rank, (kind, _, _) in errors.items()}
        self.texts = {rank: text for rank, (_, text, _) in errors.items()}


def in_processes(count: int, work: Callable[..., Any], *arguments: Any, patience_s: float = PATIENCE_S) -> list[Any]:
    """What a function returns in each of some processes; it may start a process group or a Trainer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends: list[Connection] = []
    processes = []
    for rank in range(count):
        here, there = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_run, args=(there, rank, count, port, work, arguments))
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    results: dict[int, Any] = {}
    errors: dict[int, tuple[str, str, str]] = {}
    waiting = {end: rank for rank, end in enumerate(ends)}
    try:
        while waiting:
            ready = wait(list(waiting), timeout=patience_s)
            assert ready, f"processes {sorted(waiting.values())} hang"
            for end in ready:
                rank = waiting.pop(end)
                try:
                    worked, value = end.recv()
                except EOFError:
                    worked, value = False, ("Killed", "", "it was killed")
                (results if worked else errors)[rank] = value
    finally:
        for process in processes:
            process.join(timeout=0 if waiting else 30)
            process.kill()
    if errors:
        raise ProcessFailed(errors)
    return [results[rank] for rank in range(count)]


def loaded_once(work: Callable[[], Any]) -> None:
    """Run once what the processes will, so that what libraries make for it is there before the first fork."""
    threads = torch.get_num_threads()
    work()
    torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()  # or each fork would look through all of it for garbage


def _run(end: Connection, rank: int, count: int, port: int, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, count, count)), strict=True))
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    # A fork server that an earlier test has started is not this process's child (CPython looks for its death).
    vars(forkserver._forkserver).update(vars(forkserver.ForkServer()))
    try:
        answer: tuple[bool, Any] = True, work(*arguments)
    except BaseException as error:
        answer = False, (type(error).__name__, str(error), traceback.format_exc())
    end.send(answer)
    sys.stdout.flush()
    if dist.is_initialized() and answer[0]:
        dist.destroy_process_group()
    os._exit(0)
