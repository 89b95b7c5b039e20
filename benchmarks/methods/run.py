"""`python -m benchmarks methods`: runs what the stored rows lack, cell by cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rankpilot.common.workers import Workers, count_workers, worker_pool
from rankpilot.errors import ConfigError, UnknownNameError
from rich.console import Console

from ..harness import Figures, machine_facts
from .policies import Piloted
from .registry import METHODS, find_method, perform
from .rows import RowStore, Work
from .study import DoesNotFitError, Method, MissingRowsError, Study
from .tasks import Cell, Suite, find_suite


@dataclass(frozen=True)
class Options:
    """Compare adaptive and static ranks on real fine-tunes: run what is missing of a suite, and store its rows.

    Every method gets the same: one training loop, the same batches, paired seeds, and a learning rate of its own, from
    factors of 2 around the task's, on tuning seeds and held-out rows that results never use. Rows go into `rows.jsonl`
    in the output folder, one a run; a run that was interrupted goes on there, and methods that come to the same plan
    share rows. `python -m benchmarks methods-report` makes tables, figures and answers of them.

    Suites: quick takes some minutes on two cores; standard hours (in any number of pieces), on which docs/results.md
    stands; full days, with longer runs and more seeds. "saving" asks another question of the same tasks: what the
    cheapest plan is that loses nothing against rank 8 on all modules. "validation" shares no data with them: a policy
    may be tuned on it, and never on the others.

    Attributes:
        suite: quick, standard, full, saving or validation.
        output: folder of the rows.
        methods: only these, by name; by default all of the suite.
        policies: folders of further policies to compare; each is one more method.
        cells: only cells whose names contain one of these words, such as smollm2 or 60%.
        workers: processes of one thread each; 0 for as many as there are cores.
        minutes: stop after so many, when the runs that have begun are over.
        known: a packed file of rows that are not run again, such as benchmarks/results/methods.parquet.
        pack: also write the suite's rows into this one compressed file.
        json: also write figures of the run (how many rows there are, and whether all) to this file.
    """

    suite: str = "quick"
    output: Path = Path("runs/methods")
    methods: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    workers: int = 0
    minutes: float | None = None
    known: Path | None = None
    pack: Path | None = None
    json: Path | None = None


def chosen_methods(suite: Suite, names: Sequence[str], policies: tuple[str, ...]) -> list[Method]:
    """The methods that take part.

    Raises:
        UnknownNameError, PolicyFileError: one that does not exist.
    """
    named = [find_method(name) for name in names or suite.methods]
    usual = [method for method in METHODS.values() if method.group != "saving" and (method.quick or not suite.quick)]
    further = [Piloted(policy, policy, f"the policy {policy}", quick=True) for policy in policies]
    return [*(named or usual), *further]


def chosen_cells(suite: Suite, words: Sequence[str]) -> list[Cell]:
    """The cells whose names contain one of some words, or all; UnknownNameError if there is none."""
    cells = [cell for cell in suite.cells if not words or any(word in cell.name for word in words)]
    if not cells:
        raise UnknownNameError.of("cell", " ".join(words), [cell.name for cell in suite.cells])
    return cells


def missing_work(study: Study, cell: Cell, methods: Sequence[Method]) -> list[Work]:
    """What can be done now for methods in a cell; more may be missing once it is done. Empty when all is there."""
    works: dict[Work, None] = {}
    for method in methods:
        try:
            study.steps(method.outcome(study, cell))
        except DoesNotFitError:
            continue
        except MissingRowsError as error:
            works |= dict.fromkeys(error.works)
    return list(works)


def run_missing(
    study: Study, cells: Sequence[Cell], methods: Sequence[Method], workers: Workers, progress: Console, end: float
) -> bool:
    """Run all that is missing; returns whether everything is there, and not the time up.

    Args:
        study: whose rows grow.
        cells: in this order, each to its end.
        methods: that take part.
        workers: do the work.
        progress: gets a line for each few pieces of work.
        end: on the clock of `time.monotonic`: nothing begins after it.
    """
    for number, cell in enumerate(cells):
        while works := missing_work(study, cell, methods):
            # A few at a time, so that the time limit is kept.
            for first in range(0, len(works), 8):
                if time.monotonic() > end:
                    return False
                for work, row in workers.spread(perform, works[first : first + 8]):
                    study.rows.add(work, row)
                told = (
                    f"cell {number + 1} of {len(cells)} ({cell.name}): {max(len(works) - first - 8, 0)} runs left now"
                )
                progress.print(told, markup=False, soft_wrap=True)
    return True


def benchmark(options: Options, console: Console) -> Figures:
    """Run what is missing, and tell what there is.

    Raises:
        ConfigError, UnknownNameError, PolicyFileError: bad options.
        UnsupportedError: a library is missing.
    """
    if options.workers < 0 or (options.minutes is not None and options.minutes <= 0):
        raise ConfigError(f"--workers is at least 0 and --minutes above 0; got {options.workers}, {options.minutes}.")
    suite = find_suite(options.suite)
    methods, cells = chosen_methods(suite, options.methods, options.policies), chosen_cells(suite, options.cells)
    study = Study(RowStore(options.output, options.known), suite)
    before = len(study.rows)
    end = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    with worker_pool(count_workers(options.workers)) as workers:
        complete = run_missing(study, cells, methods, workers, Console(file=sys.stderr), end)
    state = "All rows are there" if complete else "Rows are missing; the same command goes on"
    run_now, file = len(study.rows) - before, options.output / "rows.jsonl"
    console.print(f"{state}: {len(study.rows):,}, {run_now:,} run now, in {file}.", markup=False, soft_wrap=True)
    if options.pack:
        size = study.rows.pack(options.pack, study.used)
        console.print(f"Packed into {options.pack}: {size:,} bytes.", markup=False, soft_wrap=True)
    facts = {"complete": complete, "rows": len(study.rows)}
    return {**machine_facts(torch.device("cpu")), "suite": options.suite, **facts}
