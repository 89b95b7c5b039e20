"""`rankpilot policy evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from ..training.config import EvaluateConfig
from .options import on_cluster
from .progress import console, progress_bar

if TYPE_CHECKING:
    from ..training.results import Estimate, Group, PairedComparison, PolicyResult


@dataclass(frozen=True)
class Evaluate(EvaluateConfig):
    """Compare policies and rules on the same proxy fine-tunes: same tasks, seeds, batches and budgets.

    A POLICY is "default", which ships with rankpilot, the folder of a trained policy, or a rule: uniform,
    top-half, top-down, random, gradient-norm, signal-mean. oracle knows what was planted in a task, and shows what
    could be reached.

    A gain is how much lower the held-out loss is than that of uniform rank in the same budget. It is given as a share
    of the headroom, which is what the best known allocation gains over uniform rank. Every figure comes with the 95 %
    interval of a bootstrap over tasks: if the interval holds 0 (50 % for the chance of being better), the figure
    decides nothing. More tasks or more --seeds narrow it. A run takes about half a second on one core.

    In the output folder, rows.jsonl has a line for each run, and summary.json has the tables. Choose by the validation
    split; the test split is for the final report.

    Attributes:
        output: folder of the comparison.
        resume: continue an interrupted comparison in the same folder; runs that it holds are not repeated, and policies
            or seeds can be added.
        logs: write down every decision: a decision log for each run, in logs/POLICY/TASK-SEED in the output folder.
            Runs that have none are run again.
        cluster: run on a Ray cluster: "local" starts one on this machine, "auto" joins the one that runs here, and
            HOST:PORT the one with that address. The results are the same (docs/cluster.md).
    """

    policies: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")]
    output: Path = Path("runs/evaluation")
    resume: bool = False
    logs: bool = False
    cluster: str | None = None


def main(arguments: Sequence[str]) -> None:
    """Compare policies, and show who is better."""
    options = tyro.cli(Evaluate, args=arguments, prog="rankpilot policy evaluate")
    from ..training.compare import ROWS, evaluate

    if options.split == "test":
        console.print("The test split is for final reports: whoever chooses by it has no test left.")
    bar = progress_bar("policies on the same proxy fine-tunes (runs)")
    with on_cluster(options.cluster), bar as report:
        groups = evaluate(options, options.output, resume=options.resume, logs=options.logs, on_progress=report)
    for group in groups:
        console.print(comparison_table(group))
    console.print("Below a figure: its 95 % interval; below a chance also the runs won/tied/lost.", style="dim")
    console.print(f"A line for each run: {options.output / ROWS}", soft_wrap=True, markup=False)


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
