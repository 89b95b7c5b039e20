"""Benchmarks: each is a command, `python -m rankpilot.bench.NAME`, and prints a table or writes flat JSON."""
