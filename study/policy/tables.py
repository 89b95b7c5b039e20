"""The result of a comparison of policies as tables."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from ...agents.evaluation.tables import Group, PolicyResult
from ...common.statistics import Estimate, PairedComparison


def comparison_table(group: Group, against: str) -> Table:
    """Who is better on one group of tasks, best first; `against` is the policy that all are compared with.

    Below each figure is its 95 % interval, below a chance also how many runs were won, tied and lost.
    """
    table = Table(title=f"{group.name} ({group.tasks} tasks)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy", overflow="fold")
    chances = ("better than\nuniform", f"better than\n{escape(against)}")
    for column in ("runs", "held-out\nloss", "gain, of\nheadroom", "interquartile\nmean", *chances):
        table.add_column(column, justify="right")
    for result in group.results:
        table.add_row(*_cells(result))
    return table


def _cells(result: PolicyResult) -> tuple[str, ...]:
    against, failed = result.against, f"\n[red]{result.failed} failed[/]" if result.failed else ""
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
    return f"{gain.value:+.2f}\n[dim]{gain.low:+.2f} to {gain.high:+.2f}[/]"


def _chance(pairs: PairedComparison) -> str:
    """The chance of being better, its interval, and the wins, ties and losses behind it."""
    chance = pairs.better
    counts = f"{pairs.wins} / {pairs.ties} / {pairs.losses}"
    return f"{chance.value:.0%}\n[dim]{chance.low:.0%} to {chance.high:.0%}[/]\n[dim]{counts}[/]"
