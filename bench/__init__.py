"""Benchmarks: what is claimed, and measured. `rankpilot bench NAME` runs one; `main.py` has the table."""

from ..common.quiet import silence_libraries

silence_libraries()
