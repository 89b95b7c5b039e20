"""Benchmarks: each module is a command, `python -m rankpilot.bench.NAME`."""

from ..common.quiet import silence_libraries

silence_libraries()
