"""What the commands print to, and progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()
"""Standard output."""

LIBRARIES = "loading torch, transformers and PEFT"
"""What a command says first that trains or plans: they take seconds."""


@contextmanager
def stage_bar(title: str, first: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for work of several stages, the first named `first`, with the time left; `title` stands above.

    Yields:
        A function to call with (pieces done, pieces in all, name of the stage).
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
    """A progress bar for work of one kind; yields a function to call with (pieces done, pieces in all)."""
    with stage_bar(title) as report:
        yield lambda done, total: report(done, total, "")
