"""Four real SIGKILLs, one in each kind of run."""

from __future__ import annotations

import io

from rankpilot.bench.kills import KINDS, Options, benchmark
from rich.console import Console


def test_killed_runs_end_as_if_nobody_had_killed_them() -> None:
    console = Console(file=io.StringIO(), width=120)
    figures = benchmark(Options(quick=True), console)
    for kind in KINDS:
        counts = {
            key: figures[f"{kind.name.replace(' ', '_')}.{key}"] for key in ("kills", "changed", "rows", "failed")
        }
        assert counts == {"kills": 1, "changed": 0, "rows": 0, "failed": 0}, kind.name
