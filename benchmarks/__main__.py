"""`python -m benchmarks NAME`, from a checkout: what is claimed, measured again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from rankpilot.common.errors import RankPilotError, UnknownNameError
from rich.console import Console

BENCHMARKS = {
    "overhead": ("overhead", "time and memory of a step, beside LoRA and AdaLoRA"),
    "step-time": ("step_time", "predicted time of a step under any plan, and measured; budgets of time"),
    "memory": ("memory", "predicted bytes of a training step, and measured"),
    "savers": ("savers", "the same losses in fewer bytes and seconds, on a language model"),
    "parts": ("parts", "steps in parts, beside the padded rectangle and other ways to avoid its padding"),
    "published": ("published", "peaks that others measured on GPUs, and predicted"),
    "estimators": ("estimators", "what other estimators tell of peaks that were measured on a T4"),
    "published-time": ("published_time", "seconds of steps that others measured on a GPU, and predicted"),
    "peft-experiment": ("peft_experiment", "a plan for PEFT's own comparison, and what its row should show"),
    "rates": ("rates", "what the rule for the learning rate costs beside each task's best rate"),
    "loss-runs": ("loss_runs", "fine-tunes from which the rate's rule and the loss of a plan are fitted"),
    "no-sweep": ("no_sweep", "one run of rankpilot at its own rate beside plain LoRA at its best rate"),
    "labels": ("labels", "the default learning rate on labels, versus the rate at which it begins"),
    "agent": ("agent", "a trained agent beside hand rules, on families and texts that nobody learned"),
    "elastic": ("elastic", "another process takes memory in the middle of runs, and gives it back"),
    "gpu-evidence": ("gpu_evidence", "what is claimed of CUDA, predicted and measured on the card that is here"),
    "pages": ("pages", "figures of the documentation, written again from stored rows"),
    "pictures": ("pictures", "pictures of the documentation, drawn again from stored rows"),
    "worth": ("worth", "what a plan is worth: fitted on real fine-tunes, judged on those left out"),
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
        first = "Measure again what the pages claim.\n"
        last = "\nEach has its own --help and --json FILE (the figures), and nearly all have --quick (under a minute)."
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
