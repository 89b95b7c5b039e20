"""Benchmarks: each module is a command, `python -m rankpilot.bench.NAME`."""

from ..quiet import silence_libraries

silence_libraries()
