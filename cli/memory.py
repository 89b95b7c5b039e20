"""`rankpilot memory`."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.markup import escape

from ..common.errors import ConfigError
from ..cost.step_config import Quantization, StepConfig
from ..report.config import OF_CARD, MemoryConfig
from .options import parse, peek
from .progress import console, working

if TYPE_CHECKING:
    from ..cost.forecast.outlook import Outlook
    from ..report.run_plan import RunPlan
    from ..report.trainer_file import TrainerFile

SPILLS = (
    "On Windows the driver silently moves what does not fit the card into main memory, and steps become many times "
    "slower. Stay within what fits, or turn this off (CUDA - Sysmem Fallback Policy)."
)
"""Hint if the card is in a Windows machine."""

FEW_COLLECTIONS = 100_000
"""Garbage-collection threshold in objects; an answer creates many objects, but no reference cycles."""

DOES_NOT_FIT = 3
"""Exit status if the run as requested does not fit the card."""


@dataclass(frozen=True)
class Memory(MemoryConfig):
    """Show the memory use of a LoRA training step, and the savings of each choice.

    A few small steps of the model are enough to predict the peak of a step, by kind of bytes and by layer; the frozen
    model itself is shown separately. Most of the peak is held for the backward pass. It depends on the rows, the tokens
    and the depth of the lowest adapter, and hardly on the rank. The command therefore compares other ranks, fewer
    layers, smaller batches and gradient checkpointing, without running them (--details). It trains nothing, and writes
    memory.json and memory.png only to a folder given by --output.

    With --device or --device-memory the model's configuration is enough: no weights are downloaded. The answer is for
    the run as requested: its rank, rows and length, with adapters on all layers. Exact savers, checkpointing and
    streaming, which `attach` adds at the same losses, count as requested; fewer layers, rows or ranks come second. The
    exit status is 3 if the run as requested does not fit.

    Attributes:
        lengths: DATASET:COLUMN with texts to tokenize, or a file with the number of tokens of each row, whole numbers:
            also show the cost of steps on such rows in parts, compared with padded ones (docs/parts.md), and the
            longest row that fits. Rows longer than --max-length are truncated.
        output: folder for the picture and all figures; without one, nothing is written.
        details: print every choice, the batches that fit, and the memory breakdown.
        json: print all figures as JSON, and nothing else.
        config: a YAML file of axolotl, TRL or LLaMA-Factory, unmodified, or with a key `rankpilot` for the
            options of `rankpilot.attach`, whose plan is then told too. Options on the command line, and MODEL, override
            it.
        trainer: with --config, the kind of training, for a file that fits several: sft, dpo, kto, reward, grpo or rloo.
            Else settings of the Trainer, as NAME=VALUE, as for `rankpilot finetune`: packing=true.
        python: print the LoraConfig and the training arguments of the best choice; for a card.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    quantization: Annotated[Quantization, tyro.conf.arg(aliases=["--quantize"])] = field(default="none", kw_only=True)
    lengths: str | None = None
    output: Path | None = None
    details: bool = False
    json: bool = False
    config: str | None = None
    python: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json and self.python:
            raise ConfigError("--json and --python cannot be combined; pass one of them.")
        if self.card and self.trainer and not self.config:
            raise ConfigError("--trainer requires --config, or MODEL and DATA without a card.")
        if self.lengths is not None and self.image:
            raise ConfigError("--lengths are those of rows of texts: drop --image or --lengths.")


def main(arguments: Sequence[str]) -> int:
    """Show the memory use, and write the picture; return the exit status."""
    gc.set_threshold(FEW_COLLECTIONS)
    path = peek(arguments, "--config")
    file = None if path is None else _trainer_file(path, arguments)
    default = _defaults(file, arguments)
    options = parse(Memory, arguments, default, "rankpilot memory")
    if (options.python or file) and not options.card:
        which = "--config" if file else "--python"
        raise ConfigError(f"{which} requires --device or --device-memory.")
    from ..data.assets import check_model

    check_model(options.model, options.card)
    from ..common.files import refuse_file
    from ..report import memory as report
    from ..report.doubts import doubts_text

    if options.output:
        refuse_file(options.output)  # now, to fail early
    rows = None
    if options.lengths is not None:  # now, to fail early
        from ..report import lengths as of_lengths

        rows = of_lengths.lengths_of(options.lengths, options.model, options.max_length)
    with working(f"pricing the training step of {options.model}") if options.card else nullcontext():
        outlook = _asking(options, options.card, file)() if options.card else _here(options)
        found = None if rows is None else of_lengths.steps_of_lengths(outlook, rows, options.seed)
        run = _run(outlook, file)
        told = not (options.json or (options.python and (outlook.as_asked or outlook.instead)))
        opening = report.headline(outlook) + report.subject(outlook, options, file.training if file else "")
        verdict = (_verdict(outlook, run), doubts_text(outlook)) if told else ()
    if told:  # the requested answer first, then parts that take seconds more
        console.print(f"[bold]{escape(opening)}[/]", highlight=False)
        console.print("\n".join(filter(None, verdict)), markup=False, highlight=False)
        if options.details or options.budget:
            console.print(*report.tables(outlook), sep="\n")
        if len(outlook.step.saved) > 1:
            console.print(report.saver_table(outlook.step.saved))
        if found:
            console.print(of_lengths.lengths_table(found))
            console.print(of_lengths.lengths_text(found), markup=False, highlight=False)
    elif options.python:
        console.out(report.configuration_text(outlook), highlight=False)
    if options.json:
        figures = report.figures(outlook) | ({"lengths": of_lengths.lengths_figures(found)} if found else {})
        told_of = ("program", "kind", "unread", "unpriced")
        figures |= {name: getattr(file, name) for name in told_of} if file else {}
        figures |= {"run": run.figures()} if run else {}
        console.out(json.dumps(figures, indent=2), highlight=False)
    if told:
        if options.details and outlook.grid:
            console.print(report.grid_table(outlook))
        if options.os == "windows":
            console.print(SPILLS, markup=False)
        for note in _notes(options, file, outlook):
            console.print(note, markup=False, highlight=False)
    written = report.write_memory_report(outlook, options, options.output, found, run) if options.output else ""
    if told and written:
        console.print(written, soft_wrap=True, markup=False)
    return 0 if (run.fits if run else not options.card or report.fits(outlook)) else DOES_NOT_FIT


def _notes(options: Memory, file: TrainerFile | None, outlook: Outlook) -> Iterator[str]:
    """Yield lines on what is not counted, and the details of the answer."""
    from ..report import memory as report

    yield from file.remarks(str(options.config)) if file else ()
    yield from report.notes(outlook) if options.details else ()
    yield from report.remarks(outlook)
    if options.details and options.card and outlook.step.model.pixels:
        yield report.max_pixels_text(outlook, _asking(options, options.card, file))


def _verdict(outlook: Outlook, run: RunPlan | None) -> str:
    """Return the result, after that of a run under rankpilot if there is one."""
    from ..report.memory import verdict_text

    return f"{run.text()}\nWithout rankpilot: {verdict_text(outlook)}" if run else verdict_text(outlook)


def _run(outlook: Outlook, file: TrainerFile | None) -> RunPlan | None:
    """Return the first plan of a run with the options in a file; None without them."""
    if not (file and file.run):
        return None
    from ..report.run_plan import plan_of_run

    return plan_of_run(outlook, file.run, sums=file.sums)


def _trainer_file(path: str, arguments: Sequence[str]) -> TrainerFile:
    """Read a trainer's file, with the command line filling in missing settings.

    Raises:
        ConfigError: rows are not truncated, and no length is given.
    """
    from ..report.trainer_file import read_trainer_file

    file = read_trainer_file(path, peek(arguments, "--trainer"))
    if "max_length" not in file.settings and not peek(arguments, "--max-length"):
        by = "max_length" if file.kind == "SFT" else "max_prompt_length or vllm_max_model_length"
        advice = "Pass --max-length with the tokens of the longest row."
        raise ConfigError(f"{path} does not bound rows, as {by} does for {file.training}. {advice}")
    if "sharding" in file.settings and not peek(arguments, "--gpus"):
        told = f"{file.settings.pop('sharding')} (priced for one GPU: pass --gpus)"
        return replace(file, unpriced=(*file.unpriced, told))
    return file


def _here(options: Memory) -> Outlook:
    """Outlook of the model on this machine."""
    from ..report.here import memory_here

    return memory_here(options, lambda text: None if options.json else console.print(f"[dim]{escape(text)} ...[/]"))


def _defaults(file: TrainerFile | None, arguments: Sequence[str]) -> Memory:
    """Defaults of the command line: a file's settings, else the usual defaults."""
    if file is None:
        return Memory(model=tyro.MISSING)
    settings = {"model": tyro.MISSING}
    settings |= {name: value for name, value in file.settings.items() if name not in _FURTHER}
    if not any(peek(arguments, each) for each in ("--device", "--device-memory")):
        raise ConfigError("--config requires --device or --device-memory.")
    default = object.__new__(Memory)  # not checked before command-line options are applied
    for each in fields(Memory):
        object.__setattr__(default, each.name, settings.get(each.name, each.default))
    return default


_FURTHER = ("adapter", "double_quantization", "eval_length", "eval_packed", "rollouts")
"""Settings of a file without a command-line option."""


def _asking(options: Memory, card: str, file: TrainerFile | None) -> Callable[..., Outlook]:
    """Function that predicts the model's step on a card, with changes to the settings by name."""
    from ..cost.forecast.memory_of import memory_of

    names = (*(each.name for each in fields(StepConfig)), *OF_CARD)
    settings = {name: getattr(options, name) for name in names}
    if not options.bf16 and "bf16" not in (file.settings if file else ()):
        del settings["bf16"]  # the card decides
    if file:
        settings |= {name: file.settings[name] for name in _FURTHER if file.settings.get(name) is not None}
    return partial(memory_of, _configured(options.model), card, rank=options.rank, **settings)


def _configured(model: str) -> str:
    """Name of a model with a built-in configuration, or the folder of a packaged one."""
    from ..cost.forecast.known_models import short_name
    from ..data.assets import ASSETS

    if short_name(model) or model not in ASSETS:
        return model
    from ..data.models import resolve_model

    return resolve_model(model)
