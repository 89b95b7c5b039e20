"""What is claimed, measured: `python -m benchmarks NAME` from a checkout runs one; `__main__.py` has the table."""

from rankpilot.common.quiet import silence_libraries

silence_libraries()
