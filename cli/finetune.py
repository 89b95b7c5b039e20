"""`rankpilot finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from ..finetune.config import FinetuneConfig
from .config_file import peek, read_config_file, with_file_settings
from .progress import console


@dataclass(frozen=True)
class Finetune(FinetuneConfig):
    """Fine-tune a model with LoRA at the ranks that a policy decides for its modules, inside a hard budget.

    The run uses the transformers Trainer and PEFT, and plain PEFT loads the adapter that comes out. The run's folder
    holds all settings (config.json), every decision (JSON lines), the adapter, a report and pictures.

    Attributes:
        output: folder of the run.
        config: a JSON or YAML file of settings, such as the config.json of an earlier run. Options on the command line
            override it.
        resume: continue an interrupted run in the same folder; a finished run is left as it is.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    output: Path = Path("runs/finetune")
    config: Path | None = None
    resume: bool = False


def main(arguments: Sequence[str]) -> None:
    """Run the command; options on the command line go before those of --config FILE."""
    path = peek(arguments, "--config")
    base = Finetune(model=tyro.MISSING, data=tyro.MISSING)
    default = with_file_settings(base, read_config_file(path), path)
    finetune_command(tyro.cli(Finetune, args=arguments, default=default, prog="rankpilot finetune"))


def finetune_command(options: Finetune) -> None:
    """Fine-tune, compare, check the adapter, and write the report."""
    from ..finetune.experiment import finetune
    from ..study.run.comparison import summary_table
    from ..study.run.report import write_report
    from .report import print_ending

    summary = finetune(
        options, options.output, resume=options.resume, on_phase=lambda text: console.rule(escape(text), align="left")
    )
    report = write_report(options.output)
    console.print(summary_table(report.run))
    reload = summary["reload"]
    verdict = "identical" if reload["identical"] else f"different by up to {reload['max_abs_difference']:.2g}"
    console.print(f"Reloaded by plain PEFT in a process without rankpilot: logits {verdict}.", soft_wrap=True)
    print_ending(report)
