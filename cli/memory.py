"""`rankpilot memory`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.markup import escape

from ..cost.step_config import Quantization, StepConfig
from ..errors import ConfigError
from ..study.memory_config import MemoryConfig
from .options import parse
from .progress import console

if TYPE_CHECKING:
    from ..cost.outlook import Outlook

NOTHING_FITS = 3
"""The exit status where nothing fits the card."""


@dataclass(frozen=True)
class Memory(MemoryConfig):
    """Show where the bytes of a LoRA training step go, and what each choice would save.

    A few small steps of the model are enough to predict the peak of a step, by kind of bytes and by layer; the frozen
    model itself is shown apart. Most of the peak is held for the backward pass. It depends on the rows, the tokens and
    how deep the lowest adapter sits, and hardly on the rank. So the command compares other ranks, fewer layers, smaller
    batches and gradient checkpointing, without running them (--details). It trains nothing, and writes memory.json and
    memory.png only into a folder that you name (--output).

    With --device or --device-memory the configuration of the model is enough: no weights are downloaded, and the
    answer tells what fits that card, and what each choice costs. The exit status is 3 where nothing fits.

    Attributes:
        output: folder for the picture and all figures; without one, nothing is written.
        details: print every choice, the batches that fit, and where the bytes are.
        json: print all figures as JSON, and nothing else.
        config: print the LoraConfig and the training arguments of the best choice; for a card.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    quantization: Annotated[Quantization, tyro.conf.arg(aliases=["--quantize"])] = field(default="none", kw_only=True)
    output: Path | None = None
    details: bool = False
    json: bool = False
    config: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json and self.config:
            raise ConfigError("--json and --config each print one thing and nothing else: give one of them.")


def main(arguments: Sequence[str]) -> int:
    """Show where the bytes go, and write the picture; returns the exit status."""
    options = parse(Memory, arguments, Memory(model=tyro.MISSING), "rankpilot memory")
    if options.config and not options.card:
        raise ConfigError("--config is of a card: give --device or --device-memory with it.")
    from ..data.assets import check_model

    check_model(options.model, options.card)
    from ..common.files import refuse_file
    from ..study import memory_report as report
    from ..study.memory_report import saver_table

    if options.output:
        refuse_file(options.output)  # now, and not after minutes of work
    outlook = _of_card(options, options.card) if options.card else _here(options)
    told = not (options.json or (options.config and outlook.best))
    if told:  # what is asked for first, and then what takes seconds more
        console.print(f"[bold]{escape(report.subject(outlook, options))}[/]", highlight=False)
        console.print(report.verdict_text(outlook), markup=False, highlight=False)
        if options.details or options.budget:
            console.print(report.choice_table(outlook))
        if len(outlook.step.saved) > 1:
            console.print(saver_table(outlook.step.saved))
    elif options.config:
        console.out(report.configuration_text(outlook), highlight=False)
    if options.json:
        console.out(json.dumps(report.figures(outlook), indent=2), highlight=False)
    if told:
        if options.details and outlook.grid:
            console.print(report.grid_table(outlook))
        for note in [*(report.notes(outlook) if options.details else ()), *report.remarks(outlook)]:
            console.print(note, markup=False, highlight=False)
    written = report.write_memory_report(outlook, options, options.output) if options.output else ""
    if told and written:
        console.print(written, soft_wrap=True, markup=False)
    return NOTHING_FITS if options.card and not outlook.best else 0


def _here(options: Memory) -> Outlook:
    """Of the model where it is."""
    from ..study.memory_here import memory_here

    quiet = options.json
    return memory_here(options, lambda text: None if quiet else console.print(f"[dim]{escape(text)} ...[/]"))


def _of_card(options: Memory, card: str) -> Outlook:
    """Of the model's configuration on a card."""
    from ..cost.memory_of import memory_of

    settings = {each.name: getattr(options, each.name) for each in fields(StepConfig)}
    if not options.bf16:
        del settings["bf16"]  # the card decides
    with console.status(f"reading the step of {options.model} from its configuration ..."):
        return memory_of(
            _configured(options.model),
            card,
            rank=options.rank,
            dtype=options.dtype,
            gpus=options.gpus,
            sharding=options.sharding,
            **settings,
        )


def _configured(model: str) -> str:
    """A model whose configuration is known by name, or the folder of a packaged one."""
    from ..cost.known_models import short_name
    from ..data.assets import ASSETS

    if model not in ASSETS or short_name(model):
        return model
    from ..data.models import resolve_model

    return resolve_model(model)
