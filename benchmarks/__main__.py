"""`python -m benchmarks NAME`, from a checkout: what is claimed, measured again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from rankpilot.common.errors import RankPilotError, UnknownNameError
from rich.console import Console

BENCHMARKS = {
    "overhead": ("overhead", "time and memory of a step, compared with LoRA and AdaLoRA"),
    "step-time": ("step_time", "step times under any plan, predicted and measured"),
    "memory": ("memory", "memory of a training step, predicted and measured"),
    "parts": ("parts", "steps in parts, compared with padded rectangles and other ways to avoid padding"),
    "published": ("published", "peaks measured by others on GPUs, compared with predictions"),
    "zero": ("zero", "a step under DeepSpeed's ZeRO, predicted and measured on the CPU"),
    "published-time": ("published_time", "step times measured by others on a GPU, compared with predictions"),
    "rates": ("rates", "loss of the learning-rate rule compared with the best rate of each task"),
    "race": ("race", "the learning rate that a race chooses, compared with the best rate of a sweep"),
    "agent": ("agent", "a trained agent compared with hand-written rules, on unseen families and texts"),
    "elastic": ("elastic", "another process takes memory during runs and releases it"),
    "streaming": ("streaming", "a base in main memory: equal losses, time of the hooks, memory of the process"),
    "gpu-evidence": ("gpu_evidence", "claims about CUDA, predicted and measured on the local card"),
    "pages": ("pages", "rewrite the figures in the documentation from stored rows"),
    "pictures": ("pictures", "redraw the pictures in the documentation from stored rows"),
    "worth": ("worth", "the value of a plan: fitted on real fine-tunes, judged on held-out ones"),
}
"""The module of each benchmark and what it measures; a module has `Options` and `benchmark(options, console)`."""


def run(arguments: Sequence[str]) -> int:
    """Run one benchmark; returns the exit status.

    Args:
        arguments: the benchmark's name and its options. Without a name, or with --help, all names are listed.

    Raises:
        UnknownNameError: there is no benchmark of that name.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, BENCHMARKS))
        lines = [f"  [bold]python -m benchmarks {name:{width}}[/]  {told}" for name, (_, told) in BENCHMARKS.items()]
        first = "Repeat the measurements behind the documentation.\n"
        last = "\nAll support --help and --json FILE (the figures), and most --quick (under a minute)."
        Console().print("\n".join([first, *lines, last]), highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    name, *options = arguments
    if name not in BENCHMARKS:
        raise UnknownNameError.of("benchmark", name, BENCHMARKS)
    module = import_module(f"benchmarks.{BENCHMARKS[name][0]}")
    import_module("benchmarks.harness").run_command(name, module.Options, module.benchmark, options)
    return 0


def main() -> int:
    """Run one benchmark; a mistake of the caller is told in one line."""
    try:
        return run(sys.argv[1:])
    except RankPilotError as error:
        Console(stderr=True).print(f"python -m benchmarks: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
