"""Tables of where the bytes of a training step go, and the folder with all figures.

memory.json  memory.png
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ...common.drawing import save_figure
from ...common.files import write_json
from ...common.module_names import layer_titles
from ...common.settings import as_json
from ...common.tables import make_table
from ...common.units import format_bytes
from ...memory.breakdown import KINDS, Kind
from .alternatives import MemoryUse
from .config import MemoryConfig
from .picture import memory_picture

WORDS: dict[Kind, str] = {
    "saved": "tensors saved for backward",
    "inputs": "kept inputs of checkpointed segments",
    "recomputed": "the segment that runs again",
    "transient": "momentary: logits, activations' gradients",
    "weights": "adapter weights",
    "gradients": "adapter gradients",
    "optimizer": "optimiser state",
    "signals": "signal buffers",
    "others": "what trains outside the adapter",
}
"""The kinds of bytes, for people."""

MOST_LISTED = 3
"""A cell with more different ranks than this gives their range."""

HELD_BACK = 0.05, 8 * 2**20
"""Resident memory beyond the peak by this share of it and by these bytes is worth a note."""


def subject(use: MemoryUse) -> str:
    """What was looked at, in one line."""
    config = use.config
    parts = [
        f"{Path(config.model).name}, {use.task}, {use.shape.rows} x {use.shape.length} tokens",
        f"rank {config.rank} on {len(use.modules)} modules",
        *([] if any(setting.startswith("optim=") for setting in config.trainer) else [config.optimizer]),
        *([f"frozen model in {config.quantization}"] if config.quantization != "none" else []),
        *(["gradients accumulated"] if config.accumulation > 1 else []),
        *(["bf16 autocast"] if config.bf16 else []),
        *(["gradient checkpointing"] if config.checkpointing else []),
        *config.trainer,
        use.device,
    ]
    return ", ".join(parts)


def moment_text(label: str) -> str:
    """The name of a moment of the step, without the names of the wrappers."""
    phase, colon, place = label.partition(": ")
    place = place.removeprefix("base_model.model").removeprefix(".").removesuffix(".base_layer")
    return f"{phase}: {place or 'loss'}" if colon else phase


def peak_table(use: MemoryUse) -> Table:
    """The peak by kind."""
    breakdown = use.breakdown
    title = f"Peak of a training step: {moment_text(breakdown.label)}"
    table = make_table(title, ("what", "bytes", "share"), first_wraps=True)
    for kind in sorted(KINDS, key=breakdown.of_kind, reverse=True):
        if breakdown.of_kind(kind):
            table.add_row(WORDS[kind], *_with_share(breakdown.of_kind(kind), breakdown.total))
    if breakdown.margin:
        table.add_row("margin, so as not to predict too little", *_with_share(breakdown.margin, breakdown.total))
    table.add_section()
    table.add_row("[bold]total[/]", f"[bold]{format_bytes(breakdown.total)}[/]", "")
    table.add_row("frozen model, beside it, in no budget", format_bytes(use.frozen_bytes), "")
    return table


def _with_share(count: float, total: float) -> tuple[str, str]:
    return format_bytes(count), f"{count / total:.1%}"


def layer_table(use: MemoryUse) -> Table:
    """The peak by layer, with the model's output at the top."""
    breakdown = use.breakdown
    saved, moment, adapter = (breakdown.by_layer(*kinds) for kinds in _COLUMNS.values())
    every = (breakdown.bytes.sum(axis=1) / breakdown.total).tolist()
    titles, rows = layer_titles(breakdown.layers), []
    for row in range(len(titles))[::-1]:
        cells = [format_bytes(values[row]) if values[row] else "–" for values in (saved, moment, adapter)]
        rows.append((titles[row], (*cells, f"{every[row]:.1%}")))
    columns = ("layer", *_COLUMNS, "share")
    folded = ((title, *cells) for title, cells in _folded(rows))
    return make_table("By layer, the model's output at the top", columns, folded)


def rank_table(use: MemoryUse) -> Table | None:
    """The ranks that the rules give inside the budget, by layer; None without a budget."""
    rules = [alternative for alternative in use.alternatives if alternative.kind == "budget"]
    if not rules:
        return None
    breakdown, rows = use.breakdown, []
    for title, layer in list(zip(layer_titles(breakdown.layers), breakdown.layers, strict=True))[::-1]:
        inside = [each == layer for each in breakdown.layer_of]
        if any(inside):
            rows.append((title, tuple(_ranks_text(rule.ranks[inside].tolist()) for rule in rules)))
    columns = ("layer", *(rule.label.partition(" ")[0] for rule in rules))
    return make_table(f"Ranks inside {use.config.budget}", columns, ((title, *ranks) for title, ranks in _folded(rows)))


def _folded(rows: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The rows of a table by layer, with one row for numbered layers that follow one another and have equal cells."""

    def stack(row: tuple[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
        title, cells = row
        name, _, number = title.rpartition(" " if " " in title else ".")
        return (name if number.isdigit() else title, cells)

    for _, equal in groupby(rows, stack):
        (first, cells), *others = equal
        if others:
            last = others[-1][0]
            low = last.removeprefix("layer ")
            first = f"layers {low} to {first.removeprefix('layer ')}, each"
        yield first, cells


_COLUMNS: dict[str, tuple[Kind, ...]] = {
    "saved": ("saved", "inputs", "recomputed"),
    "momentary": ("transient",),
    "adapter": ("weights", "gradients", "optimizer", "signals", "others"),
}


def _ranks_text(ranks: Sequence[int]) -> str:
    """The ranks of a layer's modules: "16", "–" for no adapter, "8 ×4, 12 ×2" for mixed ones."""
    counts = Counter(ranks)
    if not any(ranks):
        return "–"
    if len(counts) == 1:
        return str(ranks[0])
    if len(counts) > MOST_LISTED:
        return f"{min(ranks)} to {max(ranks)}"
    return ", ".join(f"{rank} ×{count}" for rank, count in sorted(counts.items(), reverse=True))


def change_table(use: MemoryUse) -> Table:
    """The bytes that other choices would take."""
    asked = use.alternatives[0].peak_bytes
    title = "What to change" if use.limit_bytes is None else f"What to change, budget {format_bytes(use.limit_bytes)}"
    fits_column = ["fits"] if use.config.budget is not None else []
    table = make_table(title, ("choice", "peak", "saves", "of rank 8", *fits_column), first_wraps=True)
    previous = "rank"
    for choice in use.alternatives:
        if choice.kind not in (previous, "asked"):
            table.add_section()
            previous = choice.kind
        saves = f"{1 - choice.peak_bytes / asked:.1%}".replace("-", "−") if choice.kind != "asked" else ""
        fits = [["no", "yes"][choice.fits]] if choice.fits is not None else []
        share = f"{choice.peak_bytes / use.reference_bytes:.1%}"
        table.add_row(choice.label, format_bytes(choice.peak_bytes), saves, share, *fits)
    return table


def measured_table(use: MemoryUse) -> Table | None:
    """Predicted beside measured bytes; None if nothing was measured."""
    measured = use.measured
    if measured is None:
        return None
    tensors = "live tensors" if use.device == "cpu" else "allocated by CUDA's allocator"
    table = make_table("A real step", ("what", "bytes", "of predicted"), first_wraps=True)
    for word, count, compared in (
        ("predicted", use.breakdown.total, True),
        (f"measured: {tensors}", measured.peak_bytes, True),
        ("measured: rise of resident memory", measured.resident_bytes, True),
        ("peak resident memory of the process", measured.process_bytes, False),
        ("reserved by CUDA's allocator, the model included", measured.reserved_bytes, False),
    ):
        if count is not None:
            table.add_row(word, format_bytes(count), f"{count / use.breakdown.total:.1%}" if compared else "")
    return table


def allocator_note(use: MemoryUse) -> str:
    """Why the process takes more than its tensors, and how to change that; empty if it takes no more."""
    resident = use.measured.resident_bytes if use.measured else None
    share, count = HELD_BACK
    if resident is None or resident - use.breakdown.total < max(share * use.breakdown.total, count):
        return ""
    return (
        "The process took more than its tensors: the C library keeps freed memory for later. With "
        "MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives large pieces back at once."
    )


def finding(use: MemoryUse) -> str:
    """The main result, in one sentence."""
    breakdown = use.breakdown
    saved = sum(breakdown.of_kind(kind) for kind in _COLUMNS["saved"])
    least = min(use.alternatives[1:], key=lambda choice: choice.peak_bytes)
    thin = next(choice for choice in use.alternatives if choice.label.startswith("rank 1 "))
    return (
        f"{saved / breakdown.total:.0%} of the peak is held for the backward pass. Rank 1 takes "
        f"{thin.peak_bytes / use.reference_bytes:.0%} of the bytes that rank 8 takes; the choice that saves most, "
        f"{least.label}, takes {least.peak_bytes / use.reference_bytes:.0%} of them."
    )


def figures(use: MemoryUse) -> dict[str, Any]:
    """All figures, as JSON values."""
    breakdown = use.breakdown
    return {
        "config": as_json(MemoryConfig, use.config),
        "task": use.task,
        "device": use.device,
        "rows": use.shape.rows,
        "length": use.shape.length,
        "frozen_bytes": use.frozen_bytes,
        "peak_bytes": breakdown.total,
        "reference_bytes": use.reference_bytes,
        "limit_bytes": use.limit_bytes,
        "moment": breakdown.label,
        "margin_bytes": breakdown.margin,
        "kinds": {kind: breakdown.of_kind(kind) for kind in KINDS},
        "layers": [
            {"layer": layer, **dict(zip(KINDS, row, strict=True))}
            for layer, row in zip(breakdown.layers, breakdown.bytes.tolist(), strict=True)
        ],
        "alternatives": [
            {
                "kind": choice.kind,
                "label": choice.label,
                "peak_bytes": choice.peak_bytes,
                "share": choice.peak_bytes / use.reference_bytes,
                "kinds": {kind: choice.breakdown.of_kind(kind) for kind in KINDS},
                "fits": choice.fits,
                "ranks": dict(zip(use.modules, np.asarray(choice.ranks).tolist(), strict=True)),
            }
            for choice in use.alternatives
        ],
        "notes": list(use.notes),
        "measured": asdict(use.measured) if use.measured else None,
    }


def write_memory_report(use: MemoryUse, folder: Path) -> None:
    """Write memory.json and memory.png; existing ones are replaced."""
    write_json(folder / "memory.json", figures(use))
    save_figure(memory_picture(use), folder / "memory.png")
