"""Console output of the commands, and progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()
"""Standard output."""

LIBRARIES = "loading torch, transformers and PEFT"
"""First status message of commands that train or plan: these imports take seconds."""


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress bar with the time left, below its title; yields a function to call with (pieces done, total pieces)."""
    from rich import progress

    counts = progress.BarColumn(30), progress.MofNCompleteColumn()
    times = progress.TimeElapsedColumn(), progress.TextColumn("left:"), progress.TimeRemainingColumn()
    console.rule(title, align="left")
    with progress.Progress(*counts, *times, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a text and the time that has passed, on a terminal alone."""
    from rich import progress

    columns, hidden = ("{task.description}", progress.TimeElapsedColumn()), not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        bar.add_task(text, total=None)
        yield


def tell(*lines: str) -> None:
    """Print lines as they are, without markup, colors or breaks."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
