"""`rankpilot plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape

from ..common.errors import ConfigError
from ..common.files import write_text
from ..finetune.options import FinetuneConfig
from .options import parse, peek, read_config_file, with_file_settings
from .progress import LIBRARIES, console

if TYPE_CHECKING:
    from ..finetune.allocate import StaticPlan


Form = Literal["plan", "peft", "axolotl"]


@dataclass(frozen=True)
class Plan(FinetuneConfig):
    """Plan the ranks of a LoRA fine-tune before it begins, without training.

    A few small steps measure the cost of plans and the importance of modules; then the policy decides once. The plan is
    the first one `rankpilot finetune` would use with the same options. It is printed as a static configuration for
    another program, with the predicted memory of a training step.

    Attributes:
        form: target program: plan, a file to edit and pass as --policy; peft, arguments of LoraConfig, also for FSDP2,
            DeepSpeed and Unsloth; axolotl, lines for its config file. By default plan if the output is a .yaml file,
            else peft.
        output: write the lines to this new file; by default they are printed.
        log: a new folder for the decision log, to be explained by `rankpilot study`.
        config: a JSON or YAML file of settings. Options on the command line override it.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    form: Annotated[Form | None, tyro.conf.arg(name="for")] = None
    output: Path | None = None
    log: Path | None = None
    config: Path | None = None
    # Training-only settings; a settings file may contain them.
    compare_uniform: tyro.conf.Suppress[bool] = False
    compare_all_linear: tyro.conf.Suppress[bool] = False
    eval_every: tyro.conf.Suppress[int] = 50
    eval_batch_size: tyro.conf.Suppress[int | None] = None
    best: tyro.conf.Suppress[bool] = False
    early_stopping: tyro.conf.Suppress[int | None] = None
    merge: tyro.conf.Suppress[bool] = False
    report_to: tyro.conf.Suppress[tuple[str, ...]] = ()


def main(arguments: Sequence[str]) -> None:
    """Make the plan, and print or write it."""
    path = peek(arguments, "--config")
    base = Plan(model=tyro.MISSING, data=tyro.MISSING)
    default = with_file_settings(base, read_config_file(path), path)
    options = parse(Plan, arguments, default, "rankpilot plan")
    for given, kind in ((options.output, "file"), (options.log, "folder")):
        if given is not None and given.exists():
            raise ConfigError(f"{given} already exists. Choose a new {kind} name.")
    from ..data.assets import check_model

    check_model(options.model)
    # Output without --output can be piped to a file or a program.
    notes = Console(stderr=True) if options.output is None else console
    tell = partial(notes.rule, align="left")
    tell(LIBRARIES)
    from ..decide.rules import FILE_SUFFIXES
    from ..finetune.experiment import plan_ahead

    with redirect_stdout(sys.stderr) if options.output is None else nullcontext():
        plan = plan_ahead(options, lambda text: tell(escape(text)), options.log)
    output = options.output
    form = options.form or ("plan" if output and output.suffix in FILE_SUFFIXES else "peft")
    writers = {"peft": _peft, "axolotl": _axolotl}
    text = plan.text(output.name if output else "plan.yaml") if form == "plan" else writers[form](plan)
    if output is None:
        console.out(text, end="", highlight=False)
    else:
        write_text(output, text)
        use = f" You can edit it and pass it to rankpilot finetune with --policy {output}." if form == "plan" else ""
        console.print(f"Wrote the plan to {output}.{use}", soft_wrap=True, markup=False)
    notes.print(f"Predicted: {plan.line()}", soft_wrap=True, markup=False, highlight=False)
    if plan.learning_rate is not None:
        notes.print(f"Learning rate for this plan: {plan.learning_rate:.3g}", markup=False, highlight=False)


def _peft(plan: StaticPlan) -> str:
    """Format the plan as arguments of `peft.LoraConfig`, in JSON."""
    config = plan.config
    names = ["r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern"]
    names += ["exclude_modules", "target_modules", "modules_to_save", "task_type"]
    values = {name: getattr(config, name) for name in names if getattr(config, name)}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return json.dumps(values, indent=2) + "\n"


def _axolotl(plan: StaticPlan) -> str:
    from ..lora.adapter_file import axolotl_yaml

    return axolotl_yaml(plan.by_name()) + _rate_line(plan, "learning_rate")


def _rate_line(plan: StaticPlan, name: str) -> str:
    """Format the learning rate as a setting of that name; YAML reads 2e-05 as text."""
    rate = plan.learning_rate
    return "" if rate is None else f"{name}: {np.format_float_positional(float(f'{rate:.3g}'))}\n"
