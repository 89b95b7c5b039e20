"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def make_table(
    title: str, columns: Iterable[str], rows: Iterable[Sequence[str]] = (), *, first_wraps: bool = False
) -> Table:
    """A table for people: the first column to the left, figures to the right; without a title if that is empty."""
    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not (index or first_wraps))
    for row in rows:
        table.add_row(*row)
    return table
