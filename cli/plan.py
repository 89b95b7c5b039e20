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
from ..common.text import cost_text, make_table
from ..finetune.options import FinetuneConfig
from .options import parse, peek, read_config_file, with_file_settings
from .progress import LIBRARIES, console

if TYPE_CHECKING:
    from rich.table import Table

    from ..finetune.allocate import StaticPlan


Form = Literal["plan", "peft", "axolotl", "llama-factory", "torchtune"]


@dataclass(frozen=True)
class Plan(FinetuneConfig):
    """Plan the ranks of a LoRA fine-tune before it begins, without training.

    A few small steps measure the cost of plans and the importance of modules; then the policy decides once. The plan is
    the first one `rankpilot finetune` would use with the same options. It is printed as a static configuration for
    another program, with the predicted memory of a training step.

    Attributes:
        form: target program: plan, a file to edit and pass as --policy; peft, arguments of LoraConfig, also for FSDP2,
            DeepSpeed and Unsloth; axolotl, lines for its config file; llama-factory and torchtune, limited to one rank
            for all modules: the nearest equivalent. By default plan if the output is a .yaml file, else peft.
        output: write the lines to this new file; by default they are printed.
        log: a new folder for the decision log, to be explained by `rankpilot study`.
        frontier: also show the plans worth their cost: bytes, step time, and the expected loss relative to rank 8 on
            all modules, with its interval. Step times are measured and used in the decision, so the plan may differ.
        config: a JSON or YAML file of settings. Options on the command line override it.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    form: Annotated[Form | None, tyro.conf.arg(name="for")] = None
    output: Path | None = None
    log: Path | None = None
    frontier: bool = False
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
        plan = plan_ahead(options, lambda text: tell(escape(text)), options.log, frontier=options.frontier)
    if plan.frontier is not None:
        notes.print(_frontier(plan))
    output = options.output
    form = options.form or ("plan" if output and output.suffix in FILE_SUFFIXES else "peft")
    writers = {"peft": _peft, "axolotl": _axolotl, "llama-factory": _llama_factory, "torchtune": _torchtune}
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


def _frontier(plan: StaticPlan) -> Table:
    """Table of the plans worth their cost."""
    assert plan.frontier is not None
    rows = []
    for each in plan.frontier:
        name = f"{each.name}{', chosen' if each.taken else '' if each.fits else ', too large'}"
        cost = cost_text(each.cost, plan.unit).removesuffix(" parameters")
        step = "-" if each.seconds is None else f"{1e3 * each.seconds:.4g} ms"
        losses = (f"{value - 1:+.1%}" for value in (each.loss, each.low, each.high))
        rows.append((name, cost, step, *losses, each.verdict))
    columns = ("plan", plan.unit, "step", "loss", "from", "to", "")
    title = "Plans on the cost-loss frontier; losses relative to rank 8 on all modules"
    return make_table(title, columns, rows, first_wraps=True)


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


def _llama_factory(plan: StaticPlan) -> str:
    comment, kinds, rank, alpha = _one_rank(plan, "LLaMA-Factory")
    settings = f"finetuning_type: lora\nlora_target: {','.join(kinds)}\nlora_rank: {rank}\nlora_alpha: {alpha}\n"
    return comment + settings + _rate_line(plan, "learning_rate")


def _torchtune(plan: StaticPlan) -> str:
    comment, kinds, rank, alpha = _one_rank(plan, "torchtune")
    attention = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in kinds]
    mlp = any(name in kinds for name in ("gate_proj", "up_proj", "down_proj"))
    if not attention and not mlp:
        raise ConfigError(f"torchtune cannot adapt any module of this model ({', '.join(kinds)}). Use --for peft.")
    modules = json.dumps(attention).replace("o_proj", "output_proj")
    settings = f"  lora_attn_modules: {modules}\n  apply_lora_to_mlp: {json.dumps(mlp)}\n"
    rate = _rate_line(plan, "optimizer:\n  lr")
    return f"{comment}model:\n{settings}  lora_rank: {rank}\n  lora_alpha: {alpha}\n{rate}"


def _one_rank(plan: StaticPlan, program: str) -> tuple[str, list[str], int, int]:
    """Return, for programs without per-module ranks: a comment, the adapted module kinds, the mean rank, an alpha."""
    adapted = {name: rank for name, rank in plan.ranks.items() if rank}
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    rank = max(1, sum(adapted.values()) // sum(name.rpartition(".")[2] in kinds for name in plan.ranks))
    scales = [plan.alphas[name] / each for name, each in adapted.items()]
    one_alpha = len({plan.alphas[name] for name in adapted}) == 1
    alpha = round(plan.config.lora_alpha if one_alpha else sum(scales) / len(scales) * rank)
    comment = (
        f"# {program} supports a single rank and no rank pattern, so this only approximates the plan:\n"
        f"# its mean rank, on every module of the kinds it adapts ({len(adapted)} of {len(plan.ranks)} modules in\n"
        "# the plan). For the plan itself, use --for peft or --for axolotl.\n"
    )
    return comment, kinds, rank, alpha
