"""`rankpilot bench NAME`: the measurements behind docs/experiments.md; `bench/main.py` has the table of names."""

from __future__ import annotations

from ..bench.main import run as main

__all__ = ["main"]
