"""`rankpilot memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from ..study.memory.config import MemoryConfig
from .progress import console


@dataclass(frozen=True)
class Memory(MemoryConfig):
    """Show where the bytes of a LoRA training step go, and what each choice would save.

    A few small steps of the model are enough to predict the peak of a step, by kind of bytes and by layer; the frozen
    model itself is shown apart. Most of the peak is held for the backward pass. It depends on the rows, the tokens and
    how deep the lowest adapter sits, and hardly on the rank. So the command compares other ranks, fewer layers, smaller
    batches and gradient checkpointing, and runs none of them. It trains nothing, and writes only memory.json and
    memory.png.

    Attributes:
        output: folder of the picture and of all figures.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    output: Path = Path("runs/memory")


def main(arguments: Sequence[str]) -> None:
    """Show where the bytes go, and write the picture."""
    options = tyro.cli(Memory, args=arguments, prog="rankpilot memory")
    from ..common.run_folder import refuse_file
    from ..study.memory import report as memory_report
    from ..study.memory.alternatives import memory_use

    refuse_file(options.output)  # now, and not after minutes of work
    use = memory_use(options, lambda text: console.print(f"[dim]{escape(text)} ...[/]"))
    console.print(f"[bold]{escape(memory_report.subject(use))}[/]", highlight=False)
    tables = (memory_report.peak_table, memory_report.layer_table, memory_report.rank_table)
    for make in (*tables, memory_report.change_table, memory_report.measured_table):
        table = make(use)
        if table is not None:
            console.print(table)
    console.print(memory_report.finding(use), markup=False, highlight=False)
    for note in filter(None, (memory_report.allocator_note(use), *use.notes)):
        console.print(note, markup=False, highlight=False)
    memory_report.write_memory_report(use, options.output)
    console.print(f"Picture and all figures: {options.output}", soft_wrap=True, markup=False)
