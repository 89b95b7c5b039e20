"""What rankpilot promises about memory: predictions beside measurements, and what fewer bytes cost in loss.

`python -m rankpilot.bench.memory.run --help` tells what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ...common.devices import find_device
from ...errors import ConfigError
from ..harness import Figures, machine_facts, run_command
from ..ledger import Ledger
from ..memory import pareto_report, report
from .pareto import Outcome, compare
from .pareto_picture import pareto_picture, save_picture
from .parts import FULL, QUICK, Extent, accuracy_part, guard_part


@dataclass(frozen=True)
class Memory:
    """Show that memory is predicted, and what fewer bytes cost in loss and save in time.

    Part A sets predictions beside measurements. Random plans (random ranks, rank 0 included; all layers, top layers,
    single modules) are trained for two steps on small random Llama, BERT, GPT-2 and T5 models, with gradient
    checkpointing in each of torch's forms and in three precisions, at the batch shape of calibration and at others.
    "Saved" is what autograd holds at the end of the forward pass, "peak" all of a step, both beside the frozen model.
    An error is predicted over measured, minus 1: above 0 is safe, below 0 is not. Under checkpointing the prediction
    holds a margin. Then one larger step is looked at from outside: what the operating system (on CUDA the allocator)
    says; and a step is timed with and without the guard that measures it.

    Part B trains MiniLM-L6 on film reviews and a small Llama on source code with up to 20 plans: one rank everywhere,
    top layers, and two placement rules at 30 to 100 % of the bytes of all-linear rank 8. For each: bytes predicted and
    measured, time of a step on the largest batch (plans take turns in one process), and held-out loss after training,
    with the same seeds for all. Intervals are 95 % (bootstrap; over few seeds, so rather too narrow).

    Part C is what has to hold: at 65 % of the bytes fracrule's plan fits, and its step is 20 % shorter.

    The full run takes about 25 minutes on two cores. Leave the machine alone meanwhile; OMP_NUM_THREADS=1 makes
    figures steadier.

    Attributes:
        quick: under a minute: a thin slice of everything, whose losses and times mean nothing.
        json: also write the figures to this file, as flat JSON with names like "minilm.fracrule_at_65.loss"; results go
            into a .jsonl file beside it as they come.
        picture: also draw loss and step time against bytes into this PNG file.
        resume: go on with the results of an interrupted run, from the .jsonl file.
        device: of part A; auto is CUDA where there is one. Part B runs on the CPU.
        workers: processes that train in part B, one thread each.
        seed: of part A, at least 0; part B runs with seeds from 0.
    """

    quick: bool = False
    json: Path | None = None
    picture: Path | None = None
    resume: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 2
    seed: int = 0

    def check(self) -> None:
        """Make sure that the values are in range.

        Raises:
            ConfigError: one is not.
        """
        if self.seed < 0 or self.workers < 1:
            raise ConfigError(f"--seed is at least 0 and --workers at least 1; got {self.seed} and {self.workers}.")
        if self.resume and not self.json:
            raise ConfigError("--resume goes on with the .jsonl file beside --json FILE: name that too.")


def benchmark(options: Memory, extent: Extent, console: Console) -> Figures:
    """Run all parts, print their tables, and return all figures.

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
        tasks = _train(options, extent, ledger, bar)
    for name, outcomes in tasks.items():
        figures |= pareto_report.figures_of(name, outcomes)
        console.print(pareto_report.table_of(extent.courses[name], outcomes))
    for name, outcomes in tasks.items():
        line = pareto_report.requirement(extent.courses[name], outcomes, quick=options.quick)
        console.print(line, highlight=False)
    if options.picture:
        titled = {extent.courses[name].task.title: outcomes for name, outcomes in tasks.items()}
        save_picture(pareto_picture(titled), options.picture)
    return figures


def _pool(options: Memory) -> Executor:
    """Where training runs; a quick run's are shorter than the start of a process."""
    if options.quick:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"))


def _train(options: Memory, extent: Extent, ledger: Ledger, bar: Progress) -> dict[str, dict[str, Outcome]]:
    """Part B's outcomes, by fine-tune and plan."""
    tasks = {}
    with _pool(options) as pool:
        for name, course in extent.courses.items():
            shown = bar.add_task(f"{name}, training runs", total=course.runs)
            tasks[name] = compare(course, ledger, pool, partial(bar.advance, shown))
    return tasks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(Memory, args=arguments, prog="python -m rankpilot.bench.memory.run")
    return run_command(partial(benchmark, options, QUICK if options.quick else FULL), options.json)


if __name__ == "__main__":
    sys.exit(main())
