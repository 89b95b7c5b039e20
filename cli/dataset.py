"""`rankpilot dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .progress import console, progress_bar


@dataclass(frozen=True)
class DatasetOptions:
    """Write a data set of allocation decisions, for research: Parquet files, a data card and checksums.

    A SOURCE is the folder of a training with plan runs (rankpilot train --plan-tasks), or of a comparison whose
    decisions were logged (rankpilot evaluate --logs). Each row is one decision: what was seen of each module, the
    ranks, their probability where it is known, and how the run ended. rankpilot train --from-trials FOLDER fits value
    networks to it.

    Attributes:
        sources: folders that rows come from.
        output: new folder of the data set. After an interruption, the same command goes on.
    """

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    output: Path = Path("runs/trials")


def main(arguments: Sequence[str]) -> None:
    """Write the data set, and say what is in it."""
    options = tyro.cli(DatasetOptions, args=arguments, prog="rankpilot dataset")
    from ..study.dataset.write import write_dataset

    with progress_bar("reading decisions (files of rows)") as report:
        dataset = write_dataset(options.sources, options.output, on_progress=report)
    told = dataset.facts
    line = f"{told['rows']:,} decisions of {told['runs']:,} runs on {told['tasks']:,} tasks are in {options.output}."
    console.print(line, markup=False, highlight=False, soft_wrap=True)
