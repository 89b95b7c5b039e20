"""`rankpilot memory`."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
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
    from ..report.trainer_file import TrainerFile

SPILLS = (
    "On Windows the driver silently moves what does not fit the card into main memory, and steps become many times "
    "slower. Stay within what fits, or turn this off (CUDA - Sysmem Fallback Policy)."
)
"""Hint if the card is in a Windows machine."""

WITHOUT_CARD = (
    "Name the card: --device 'RTX 4090' or --device-memory 24GiB. What a run takes on this machine, on its own data, "
    "is told by `rankpilot finetune MODEL DATA --dry`, or for your own script by `rankpilot run --dry -- python "
    "train.py`."
)

FEW_COLLECTIONS = 100_000
"""Garbage-collection threshold in objects; an answer creates many objects, but no reference cycles."""

DOES_NOT_FIT = 3
"""Exit status if the run as requested does not fit the card."""


GROUPS = {
    "common": (
        "The card, the adapter, the batch and the answer.",
        "device device_memory rank batch_size max_length quantization optimizer gradient_checkpointing target_modules "
        "config trainer details json python output lengths",
    ),
    "further": (
        "Several cards, and how the step is computed.",
        "gpus sharding dtype bf16 attention loss lora_dropout target_parameters experts accumulation stream offload "
        "reentrant packed exact_savers prepare_kbit eval_batch_size keep_logits expandable_segments image images "
        "max_pixels os",
    ),
}
"""Option groups in --help."""


@dataclass(frozen=True)
class Memory(MemoryConfig):
    """Show the memory use of a LoRA training step, and the savings of each choice.

    The model's configuration is enough: nothing else is downloaded, and nothing is trained. The answer is for the run
    as requested, with adapters on all layers; what `attach` adds at the same losses (exact savers, checkpointing,
    streaming) is part of it. Fewer layers, rows or ranks come second (--details). Exit status 3: it does not fit.

    On this machine, with your data: `rankpilot finetune MODEL DATA --dry`, `rankpilot run --dry -- COMMAND`.

    Attributes:
        lengths: DATASET:COLUMN or file of lengths: steps in parts.
        output: folder for the picture and all figures.
        details: every choice, the batches, the breakdown.
        json: all figures as JSON.
        config: yaml of axolotl, TRL or LLaMA-Factory.
        trainer: its kind of training: sft, dpo, kto, reward, grpo.
        python: print the LoraConfig and arguments.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    quantization: Annotated[Quantization, tyro.conf.arg(aliases=["--quantize"])] = field(default="none", kw_only=True)
    lengths: str | None = None
    output: Path | None = None
    details: bool = False
    json: bool = False
    config: str | None = None
    trainer: str | None = None
    python: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json and self.python:
            raise ConfigError("--json and --python cannot be combined; pass one of them.")
        if self.trainer and not self.config:
            raise ConfigError("--trainer requires --config.")
        if self.lengths is not None and self.image:
            raise ConfigError("--lengths are those of rows of texts: drop --image or --lengths.")


def main(arguments: Sequence[str]) -> int:
    """Show the memory use, and write the picture; return the exit status."""
    gc.set_threshold(FEW_COLLECTIONS)
    asks = {"-h", "--help"} & {*arguments}
    if not asks and not any(peek(arguments, each) is not None for each in ("--device", "--device-memory")):
        raise ConfigError(WITHOUT_CARD)
    path = peek(arguments, "--config")
    file = None if path is None else _trainer_file(path, arguments)
    default = _defaults(file)
    options = parse(Memory, arguments, default, "rankpilot memory", GROUPS)
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
    with working(f"pricing the training step of {options.model}"):
        outlook = _asking(options, options.card, file)()
        found = None if rows is None else of_lengths.steps_of_lengths(outlook, rows)
        told = not (options.json or (options.python and (outlook.as_asked or outlook.instead)))
        opening = report.headline(outlook) + report.subject(outlook, options, file.training if file else "")
        verdict = (report.verdict_text(outlook), doubts_text(outlook)) if told else ()
    if told:  # the requested answer first, then parts that take seconds more
        console.print(f"[bold]{escape(opening)}[/]", highlight=False)
        console.print("\n".join(filter(None, verdict)), markup=False, highlight=False)
        if options.details:
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
        console.out(json.dumps(figures, indent=2), highlight=False)
    if told:
        if options.details and outlook.grid:
            console.print(report.grid_table(outlook))
        if options.os == "windows":
            console.print(SPILLS, markup=False)
        for note in _notes(options, file, outlook):
            console.print(note, markup=False, highlight=False)
    written = report.write_memory_report(outlook, options, options.output, found) if options.output else ""
    if told and written:
        console.print(written, soft_wrap=True, markup=False)
    return 0 if report.fits(outlook) else DOES_NOT_FIT


def _notes(options: Memory, file: TrainerFile | None, outlook: Outlook) -> Iterator[str]:
    """Yield lines on what is not counted, and the details of the answer."""
    from ..report import memory as report

    yield from file.remarks(str(options.config)) if file else ()
    yield from report.notes(outlook) if options.details else ()
    yield from report.remarks(outlook)
    if options.details and outlook.step.model.pixels:
        yield report.max_pixels_text(outlook, _asking(options, options.card, file))


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


def _defaults(file: TrainerFile | None) -> Memory:
    """Defaults of the command line: a file's settings, else the usual defaults."""
    if file is None:
        return Memory(model=tyro.MISSING)
    settings = {"model": tyro.MISSING}
    settings |= {name: value for name, value in file.settings.items() if name not in _FURTHER}
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
