"""Four real SIGKILLs, one in each kind of run."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rankpilot.bench import kills
from rankpilot.bench.kills import KINDS, Options, benchmark
from rich.console import Console
from tqdm import tqdm
from tqdm.auto import tqdm as auto


@pytest.mark.long
def test_killed_runs_end_as_if_nobody_had_killed_them() -> None:
    console = Console(file=io.StringIO(), width=120)
    figures = benchmark(Options(quick=True), console)
    for kind in KINDS:
        counts = {
            key: figures[f"{kind.name.replace(' ', '_')}.{key}"] for key in ("kills", "changed", "rows", "failed")
        }
        assert counts == {"kills": 1, "changed": 0, "rows": 0, "failed": 0}, kind.name


def test_a_killed_process_leaves_no_semaphore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar's lock is one by default, and only the process that made it removes it."""
    locks = []
    monkeypatch.setattr(tqdm, "_lock", tqdm.get_lock())
    kills._train_in_process(lambda *_: locks.extend([tqdm.get_lock(), auto.get_lock()]), tmp_path, tmp_path)
    assert {type(lock) for lock in locks} == {type(threading.RLock())}
