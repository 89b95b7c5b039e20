"""Work spread over processes of one thread each, so that results do not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

Spread = Callable[[Callable[[Piece], Result], Sequence[Piece]], Iterator[tuple[Piece, Result]]]


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


@contextmanager
def worker_pool(workers: int) -> Iterator[Spread[Any, Any]]:
    """Yields what spreads pieces of work over processes, and yields each with its result as soon as that is there.

    Args:
        workers: processes; with one, all happens in this process.
    """
    if workers == 1:
        yield _one_by_one
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)

    def side_by_side(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Result]]:
        futures = {pool.submit(work, piece): piece for piece in pieces}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield side_by_side
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """What a worker does first: one thread for its work, and one that ends it when its parent is killed."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _one_by_one(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Result]]:
    for piece in pieces:
        with isolated():
            result = work(piece)
        yield piece, result


def count_workers(asked: int) -> int:
    """Worker processes for a setting in which 0 stands for as many as there are cores."""
    return asked or os.cpu_count() or 1
