"""`rankpilot bench NAME`: one table of all benchmarks; a benchmark's libraries are loaded when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from rich.console import Console

from ..errors import UnknownNameError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        module: inside this package; it has `Options` and `benchmark(options, console)`, which returns the figures.
        description: what is measured, one line.
    """

    module: str
    description: str


BENCHMARKS: dict[str, Benchmark] = {
    "overhead": Benchmark("step.overhead", "time and memory of a step, beside LoRA and AdaLoRA"),
    "start": Benchmark("start", "what happens before the first step, as a share of a run"),
    "recompute": Benchmark("step.recompute", "a step in which as few layers run again as a budget needs"),
    "step-time": Benchmark("step.time", "predicted time of a step under any plan, and measured; budgets of time"),
    "decide": Benchmark("step.decide", "time of a decision on up to 1,001 modules"),
    "memory": Benchmark("memory.run", "predicted bytes of a training step, and measured"),
    "published": Benchmark("memory.published_run", "peaks that others measured on GPUs, and predicted"),
    "env-speed": Benchmark("env_speed", "speed of stacked episodes, beside PEFT"),
    "kills": Benchmark("kills", "fine-tunes that are killed and resumed"),
    "scaling": Benchmark("scaling", "best learning rate by rank and placement, under three rules for LoRA's scaling"),
    "methods": Benchmark("methods.run", "adaptive and static ranks side by side, on real models, each tuned alike"),
    "methods-report": Benchmark("methods.report.run", "tables, figures and answers from the stored rows of methods"),
    "policy": Benchmark("policy.run", "the shipped policy beside rules and its parts, on proxies that it never saw"),
    "aims": Benchmark("aims", "what the shipped policy is to reach, and what it reaches, from stored rows"),
    "plan-runs": Benchmark("plan_runs", "many plans for real fine-tunes, from which value networks learn"),
    "transfer": Benchmark("transfer", "policies beside uniform rank, on MiniLM-L6"),
}


def run(arguments: Sequence[str]) -> int:
    """Run one benchmark; returns the exit status.

    Args:
        arguments: the benchmark's name and its options. Without a name, or with --help, all names are listed.

    Raises:
        UnknownNameError: there is no benchmark of that name.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, BENCHMARKS))
        lines = [f"  [bold]rankpilot bench {name:{width}}[/]  {row.description}" for name, row in BENCHMARKS.items()]
        first = "Measure again what docs/experiments.md reports.\n"
        last = "\nEach has its own --help and --json FILE (the figures), and nearly all have --quick (under a minute)."
        Console().print("\n".join([first, *lines, last]), highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    name, *options = arguments
    if name not in BENCHMARKS:
        raise UnknownNameError.of("benchmark", name, BENCHMARKS)
    module = import_module(f"rankpilot.bench.{BENCHMARKS[name].module}")
    run_command = import_module("rankpilot.bench.harness").run_command
    run_command(name, module.Options, module.benchmark, options)
    return 0
