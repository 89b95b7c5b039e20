"""What rankpilot promises about memory: predictions beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

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

    def check(self) -> None:
        """Make sure that the values are in range.

        Raises:
            ConfigError: one is not.
        """
        if self.seed < 0:
            raise ConfigError(f"--seed is at least 0; got {self.seed}.")
        if self.resume and not self.json:
            raise ConfigError("--resume goes on with the .jsonl file beside --json FILE: name that too.")


def benchmark(options: Memory, extent: Extent, console: Console) -> Figures:
    """Run both parts, print their tables, and return all figures.

    Raises:
        ConfigError: a value out of range, an absent device, or results that are in the way.
    """
    options.check()
    device = find_device(options.device)
    ledger = Ledger(options.json.with_suffix(".jsonl") if options.json else None, resume=options.resume)
    figures: Figures = {**machine_facts(device), "quick": options.quick, "seed": options.seed}
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        figures |= report.accuracy(accuracy_part(extent, device, options.seed, ledger, bar), console)
        figures |= report.guard(guard_part(extent, device, options.seed, ledger, bar), console)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Memory, args=arguments, prog="rankpilot bench memory")
    return run_command(partial(benchmark, options, QUICK if options.quick else FULL), options.json)
