"""What rankpilot promises about memory: predictions beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ...common.devices import find_device
from ...errors import ConfigError
from ..harness import Figures, machine_facts, run_command
from ..ledger import Ledger
from . import report
from .parts import FULL, QUICK, Extent, accuracy_part, guard_part


@dataclass(frozen=True)
class Memory:
    """Show that the memory of a training step is predicted.

    Random plans (random ranks, rank 0 included; all layers, top layers, single modules) are trained for two steps on
    small random Llama, BERT, GPT-2 and T5 models, with gradient checkpointing in each of torch's forms and in three
    precisions, at the batch shape of calibration and at others. "Saved" is what autograd holds at the end of the
    forward pass, "peak" all of a step, both beside the frozen model. An error is predicted over measured, minus 1:
    above 0 is safe, below 0 is not. Under checkpointing the prediction holds a margin.

    Then one larger step is looked at from outside: what the operating system (on CUDA the allocator) says; and a step
    is timed with and without the guard of the budget that measures it. Intervals are 95 % (bootstrap).

    The full run takes about five minutes on two cores. Leave the machine alone meanwhile; OMP_NUM_THREADS=1 makes
    figures steadier.

    Attributes:
        quick: under a minute: a thin slice of everything, whose times mean nothing.
        json: also write the figures to this file, as flat JSON with names like
            "accuracy.no_checkpointing.peak_error_median"; results go into a .jsonl file beside it as they come.
        resume: go on with the results of an interrupted run, from the .jsonl file.
        device: auto is CUDA where there is one.
        seed: of models, batches and plans, at least 0.
    """

    quick: bool = False
    json: Path | None = None
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def benchmark(options: Memory, extent: Extent, console: Console) -> Figures:
    """Run both parts, print their tables, and return all figures.

    Raises:
        ConfigError: a value out of range, an absent device, or results that are in the way.
    """
    if options.seed < 0:
        raise ConfigError(f"--seed is at least 0; got {options.seed}.")
    device = find_device(options.device)
    ledger = Ledger(options.json, resume=options.resume)
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    figures |= report.accuracy(accuracy_part(extent, device, options.seed, ledger), console)
    figures |= report.guard(guard_part(extent, device, options.seed, ledger), console)
    return figures


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""

    def sized(options: Memory, console: Console) -> Figures:
        return benchmark(options, QUICK if options.quick else FULL, console)

    return run_command("memory", Memory, sized, arguments)
