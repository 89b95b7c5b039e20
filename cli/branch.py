"""`rankpilot branch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro
from rich.markup import escape

from .progress import console
from .study import write_study


@dataclass(frozen=True)
class BranchOptions:
    """Run a fine-tune once more with another plan from one step on: same data, seed, batches and budget.

    So one learns what the policy's choice was worth in this run. Three questions have a plan of their own: did changes
    on the way matter (--plan final, from step 0: the last ranks from the start), did the choice between layers matter
    (--plan shuffled: the same ranks dealt anew among the modules of each kind), and was it worth anything at all
    (--plan uniform). RUN is the folder of rankpilot finetune. One run is one seed: small differences decide nothing.

    Attributes:
        run: the folder of the run.
        plan: final, first, shuffled or uniform; or a file with the rank of each module, as rankpilot plan --output
            plan.yaml writes it.
        at: the optimizer step from which the plan is in place: 0, or that of a checkpoint which the run still has. A
            run keeps more of them with --trainer save_total_limit=100.
        output: a new folder for the branch; by default it is named after the run, the plan and the step.
        seed: of the shuffled plan.
        resume: go on with an interrupted branch.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    plan: str = "final"
    at: int = 0
    output: Path | None = None
    seed: int = 0
    resume: bool = False


def main(arguments: Sequence[str]) -> None:
    """Run the branch, and hold it against its run."""
    options = tyro.cli(BranchOptions, args=arguments, prog="rankpilot branch")
    from ..finetune.experiment import branch, other_plan
    from ..study.run_data import find_log

    plan = other_plan(find_log(options.run), options.plan, options.seed)
    label = Path(options.plan).stem
    output = options.output or (run := options.run.resolve()).with_name(f"{run.name}-{label}-at-{options.at}")
    branch(
        options.run,
        output,
        plan,
        at=options.at,
        label=label,
        resume=options.resume,
        tell=lambda text: console.rule(escape(text), align="left"),
    )
    write_study((output,))
    _compare(options.run, output, label)


def _compare(run: Path, output: Path, label: str) -> None:
    """Show both held-out losses, and where to look further."""
    from ..finetune.options import PILOT
    from ..study.run_data import read_run

    before, after = (read_run(folder).results.get(PILOT) for folder in (run, output))
    if before and after:
        ratio = after["held_out_loss"] / before["held_out_loss"] - 1
        differs = f"{abs(ratio):.1%} {'higher' if ratio > 0 else 'lower'}" if abs(ratio) >= 0.0005 else "the same"
        from ..study.verdict import ONE_RUN_EACH

        console.print(
            f"{ONE_RUN_EACH}: held-out loss {after['held_out_loss']:.4f} with the plan {label}, "
            f"{before['held_out_loss']:.4f} in the run: {differs}.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    both = " ".join(quote(str(folder)) for folder in (run, output))
    console.print(f"Both side by side: rankpilot study {both} --output both.html", markup=False, soft_wrap=True)
