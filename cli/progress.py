"""Console output of the commands, and progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()
"""Standard output."""

LIBRARIES = "loading torch, transformers and PEFT"
"""First status message of commands that train or plan: these imports take seconds."""


@contextmanager
def stage_bar(title: str, first: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """Progress bar for work in several stages, the first named `first`, with the time left; `title` is shown above it.

    Yields:
        A function to call with (pieces done, total pieces, name of the stage).
    """
    from rich import progress

    counts = progress.BarColumn(30), progress.MofNCompleteColumn()
    times = progress.TimeElapsedColumn(), progress.TextColumn("left:"), progress.TimeRemainingColumn()
    columns = progress.TextColumn("{task.description}"), *counts, *times
    console.rule(title, align="left")
    with progress.Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(first, total=None)
        yield lambda done, total, stage: bar.update(task, description=stage, completed=done, total=total)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress bar for a single stage; yields a function to call with (pieces done, total pieces)."""
    with stage_bar(title) as report:
        yield lambda done, total: report(done, total, "")
