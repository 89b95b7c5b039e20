"""`rankpilot evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..agents.evaluation.config import EvaluateConfig
from .on_cluster import on_cluster
from .progress import console, progress_bar


@dataclass(frozen=True)
class Evaluate(EvaluateConfig):
    """Compare policies and rules on the same proxy fine-tunes: same tasks, seeds, batches and budgets.

    A POLICY is "default", which ships with rankpilot, the folder of a trained policy, or a rule: uniform,
    uniform-16, uniform-32, top-half, top-third, top-down, top-down-mlp, one-deeper, two-deeper, all-layers,
    ramp-up, ramp-down, random, gradient-norm, adalora, snr, signal-mean, utility-per-byte. explore-0.05:FOLDER draws
    the plans of a trained policy at that temperature, in the unit of the votes. static:LOGS and shuffled:LOGS run at
    the final ranks of runs that were logged before (--logs; LOGS is OUTPUT/logs/POLICY), as they are or dealt anew
    among the modules of each kind: what changes on the way, and the choice of layers, were worth. oracle knows what was
    planted in a task, and shows what could be reached.

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
    options = tyro.cli(Evaluate, args=arguments, prog="rankpilot evaluate")
    from ..agents.evaluation.evaluate import ROWS, evaluate
    from ..study.policy.tables import comparison_table

    if options.split == "test":
        console.print("The test split is for final reports: whoever chooses by it has no test left.")
    bar = progress_bar("policies on the same proxy fine-tunes (runs)")
    with on_cluster(options.cluster), bar as report:
        groups = evaluate(options, options.output, resume=options.resume, logs=options.logs, on_progress=report)
    for group in groups:
        console.print(comparison_table(group))
    console.print("Below a figure: its 95 % interval; below a chance also the runs won/tied/lost.", style="dim")
    console.print(f"A line for each run: {options.output / ROWS}", soft_wrap=True, markup=False)
