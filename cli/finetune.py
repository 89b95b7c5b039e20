"""`rankpilot finetune`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from ..finetune.options import FinetuneConfig
from .options import parse, peek, read_config_file, with_file_settings
from .progress import LIBRARIES, console, tell
from .study import write_study


@dataclass(frozen=True)
class Finetune(FinetuneConfig):
    """Fine-tune a model with LoRA at ranks a policy decides for its modules, within a hard budget.

    The run uses the transformers Trainer and PEFT, and plain PEFT loads the resulting adapter. The run's folder
    contains all settings (config.json), every decision (JSON lines), the adapter, and a summary page (study.html).

    Attributes:
        output: folder of the run.
        config: a JSON or YAML file of settings, such as the config.json of an earlier run. Options on the command line
            override it.
        resume: continue an interrupted run in the same folder; a finished run is unchanged.
        dry: tell the limit, the plan and what a step takes, without training; nothing is written.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    output: Path = Path("runs/finetune")
    config: Path | None = None
    resume: bool = False
    dry: bool = False


def main(arguments: Sequence[str]) -> None:
    """Run the command; command-line options override those of --config FILE."""
    path = peek(arguments, "--config")
    base = Finetune(model=tyro.MISSING, data=tyro.MISSING)
    default = with_file_settings(base, read_config_file(path), path)
    finetune_command(parse(Finetune, arguments, default, "rankpilot finetune"))


def finetune_command(options: Finetune) -> None:
    """Fine-tune, compare, and write the page of the run."""
    from ..data.assets import check_model

    check_model(options.model)
    from ..common.processes import is_first_process

    if is_first_process():
        console.rule(LIBRARIES, align="left")
    from ..finetune.experiment import dry_run, finetune

    def on_phase(text: str) -> None:
        console.rule(escape(text), align="left")

    if options.dry:
        return dry_run(options, on_phase, tell)
    finetune(options, options.output, resume=options.resume, on_phase=on_phase)
    if is_first_process():
        write_study((options.output,))
