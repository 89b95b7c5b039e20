"""How far a run of the methods benchmark has come, and about how long it will take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from .method import Method
from .tasks import Cell, Suite
from .work import Work

LINE_SECONDS = 20.0
"""A line is written so often at most."""

EXPECTED_RATES = 3.5
"""Rates that a method's tuning tries, about."""


class Progress:
    """Tells on a console what has been done and what is left.

    Args:
        console: gets a line from time to time.
        cells: that are run, in this order.
        methods: that take part.
        suite: whose seeds are run.

    Attributes:
        cpu_s: CPU seconds of all work that was done.
    """

    def __init__(self, console: Console, cells: Sequence[Cell], methods: Sequence[Method], suite: Suite) -> None:
        self.cpu_s: float = 0.0
        self._console, self._cells, self._methods, self._suite = console, cells, methods, suite
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._start = self._told = time.monotonic()
        self._number = self._left = self._after = 0

    def begins(self, number: int, cell: Cell, works: Sequence[Work]) -> None:
        """Work of a cell begins, of which more may follow."""
        self._number, self._left = number, len(works)
        tuning = sum(bool(work.get("tuning")) for work in works)
        self._after = round(tuning * len(self._suite.seeds) / (EXPECTED_RATES * len(self._suite.tuning_seeds)))

    def done(self, work: Work, row: dict[str, Any]) -> None:
        """A row is there."""
        self.cpu_s += row["cpu_s"]
        self._left -= 1
        if work.kind == "train":
            self._seconds[work.task.key].append(row["cpu_s"])
        if time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            cell = self._cells[self._number]
            self._console.print(
                f"cell {self._number + 1} of {len(self._cells)} ({cell.name}): {self._left} runs left now, about "
                f"{self._after} to follow; {self.cpu_s / 3600:.2f} CPU h done, about {self._hours_left():.1f} h left",
                markup=False,
                soft_wrap=True,
            )

    def _hours_left(self) -> float:
        """Wall hours, from the pace so far and the runs that cells usually take."""
        known = [second for seconds in self._seconds.values() for second in seconds] or [1.0]
        usual = sum(known) / len(known)
        per_cell = len(self._methods) * (EXPECTED_RATES * len(self._suite.tuning_seeds) + len(self._suite.seeds))
        later = sum(self._mean(cell, usual) * per_cell for cell in self._cells[self._number + 1 :])
        now = self._mean(self._cells[self._number], usual) * (self._left + self._after)
        pace = (time.monotonic() - self._start) / max(self.cpu_s, 1e-9)
        return (now + later) * pace / 3600

    def _mean(self, cell: Cell, usual: float) -> float:
        seconds = self._seconds.get(cell.task.key)
        return sum(seconds) / len(seconds) if seconds else usual
