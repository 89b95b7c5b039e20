"""What the commands print to, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()
"""Standard output."""


@contextmanager
def stage_bar(title: str, first: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for work of several stages, with the time left.

    Args:
        title: the line above the bar.
        first: name of the first stage.

    Yields:
        A function to call with (pieces done, pieces in all, name of the stage).
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    console.rule(title, align="left")
    with Progress(TextColumn("{task.description}"), *columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(first, total=None)
        yield lambda done, total, stage: bar.update(task, description=stage, completed=done, total=total)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work of one kind; yields a function to call with (pieces done, pieces in all)."""
    with stage_bar(title) as report:
        yield lambda done, total: report(done, total, "")
