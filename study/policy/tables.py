"""The result of a comparison of policies as tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ...agents.evaluation.results import Group, PolicyResult
from ...common.statistics import Estimate, PairedComparison


def comparison_table(group: Group) -> Table:
    """Who is better on one group of tasks, best first.

    Below each figure is its 95 % interval, below a chance also how many runs were won, tied and lost.
    """
    # Narrow enough for 80 columns with the name of any rule in one line.
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    table = Table(title=f"{group.name} ({group.tasks} tasks)", title_justify="left", **look)
    table.add_column("policy", overflow="fold", min_width=16)
    chances = ("better than\nuniform", f"better than\n{escape(group.against)}")
    for column in ("runs", "held-\nout\nloss", "gain, of\nheadroom", "inter-\nquartile\nmean"):
        table.add_column(column, justify="right")
    for column in chances:
        table.add_column(column, justify="right", overflow="fold", min_width=11)
    for result in group.results:
        table.add_row(*_cells(result))
    return table


def _cells(result: PolicyResult) -> tuple[str, ...]:
    against, failed = result.against, f"\n[red]{result.failed}\nfailed[/]" if result.failed else ""
    return (
        escape(result.policy),
        f"{result.runs}{failed}",
        "" if result.loss is None else f"{result.loss:.4f}",
        _gain(result.improvement),
        _gain(result.interquartile),
        _chance(result.uniform),
        _chance(against) if against else "",
    )


def _gain(gain: Estimate) -> str:
    return f"{gain.value:+.2f}\n[dim]{gain.low:+.2f} to\n{gain.high:+.2f}[/]"


def _chance(pairs: PairedComparison) -> str:
    """The chance of being better, its interval, and the wins, ties and losses behind it."""
    chance = pairs.better
    counts = f"{pairs.wins}/{pairs.ties}/{pairs.losses}"
    return f"{chance.value:.0%}\n[dim]{chance.low:.0%} to {chance.high:.0%}[/]\n[dim]{counts}[/]"
