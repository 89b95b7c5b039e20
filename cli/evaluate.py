"""`rankpilot policy evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..common.errors import ConfigError
from ..common.text import make_table
from .progress import console, progress_bar


@dataclass(frozen=True)
class Evaluate:
    """Compare policies and rules on the same short fine-tunes: same tasks, seeds, batches and budgets.

    A POLICY is "default", "agent", the folder of a trained policy, or a rule: left-alone, rate, halving, union,
    uniform, top-down, signal-mean. Tasks come from four regimes: few ranks, a wrong learning rate, a changing budget
    and text, and none of these. Each figure is the held-out loss relative to the first policy, in % above it, with
    the 95 % interval of a bootstrap over tasks: below 0 is better, and an interval containing 0 is inconclusive.

    Attributes:
        output: folder of the comparison: rows.jsonl has one line per run.
        tasks: tasks per regime; each takes about half a CPU second per policy. A single task gives no intervals.
        split: split of the tasks: the bases and texts of "test" are unseen in training.
        seed: seed of the tasks.
        oracle: also show the oracle, a plan computed from the planted changes; planted tasks only.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")] = ()
    output: Path = Path("runs/evaluation")
    tasks: int = 16
    split: Literal["train", "test"] = "test"
    seed: int = 0
    oracle: bool = False


def main(arguments: Sequence[str]) -> None:
    """Compare policies, and show the results."""
    options = tyro.cli(Evaluate, args=arguments, prog="rankpilot policy evaluate")
    if options.tasks < 1 or not options.policies:
        raise ConfigError(f"At least one policy and one task per regime are required; got {options.tasks} tasks.")
    from ..agents.policy_file import load_policy
    from ..common.files import append_json_line, open_run
    from ..env.evaluate import compare, evaluation_tasks, table

    policies = {name: load_policy(name) for name in options.policies}
    tasks = evaluation_tasks(options.tasks, split=options.split, seed=options.seed)
    rows = []
    settings = {"policies": list(policies), "tasks": options.tasks, "split": options.split, "seed": options.seed}
    with open_run(options.output, settings, resume=False), progress_bar("fine-tunes") as report:
        for row in compare(policies, tasks, oracle=options.oracle, on_progress=report):
            rows.append(row)
            append_json_line(options.output / "rows.jsonl", asdict(row))
    first = options.policies[0]
    found = table(rows, first)
    cells = [(name, *(f"{row[of]:+.1f}" if of in row else "" for of in found[first])) for name, row in found.items()]
    title = f"Held-out loss relative to {first}, %"
    console.print(make_table(title, ("policy", *found[first]), cells, first_wraps=True))
    if options.tasks == 1:
        console.print("A single task per regime gives no intervals: pass more --tasks.")
    console.print(f"One line per run: {options.output / 'rows.jsonl'}", soft_wrap=True, markup=False)
