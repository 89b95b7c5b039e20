"""`rankpilot bench NAME`: the measurements behind docs/experiments.md, each with options of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ..errors import UnknownNameError
from .progress import console


class Benchmark(NamedTuple):
    """One measurement: the module below `rankpilot.bench` whose `main(arguments)` runs it, and what it measures."""

    module: str
    summary: str


BENCHMARKS = {
    "overhead": Benchmark("step.overhead", "time and memory of a step, beside plain LoRA and AdaLoRA"),
    "resize": Benchmark("step.resize", "time of a rank change"),
    "decide": Benchmark("step.decide", "time of a decision"),
    "memory": Benchmark("memory.run", "predicted beside measured bytes, and what plans of few bytes lose"),
    "env-speed": Benchmark("training.env_speed", "steps a second of the environment"),
    "learners": Benchmark("training.learners", "what other learners reach with as many episodes"),
    "plan-value": Benchmark("training.plan_value", "what plan critics know of tasks that they have not seen"),
    "transfer": Benchmark("transfer", "policies and uniform ranks on fine-tunes of a real model"),
}
"""Every measurement by its name on the command line."""


def main(arguments: Sequence[str]) -> int:
    """List the measurements, or run one with its options.

    Raises:
        UnknownNameError: no such measurement.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  [bold]rankpilot bench {name:<12}[/]{row.summary}" for name, row in BENCHMARKS.items())
        text = f"Measure again what docs/experiments.md reports.\n\n{rows}\n\nEach has its own --help."
        console.print(text, highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in BENCHMARKS:
        raise UnknownNameError.of("benchmark", name, BENCHMARKS)
    status: int = import_module(f"rankpilot.bench.{BENCHMARKS[name].module}").main(rest)
    return status
