"""What fits a card: a verdict in words, tables, and all figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from ...common.drawing import save_figure
from ...common.files import write_json
from ...common.tables import make_table
from ...common.units import format_bytes
from ...errors import BudgetError
from ...lora.ladder import REFERENCE_RANK
from ...memory.outlook import USUAL_CARD, Choice, GridCell, Outlook
from .card_picture import card_picture


def card_subject(outlook: Outlook) -> str:
    """What was looked at, in one line."""
    step, settings = outlook.step, outlook.settings
    parts = [
        f"{step.parameters / 1e9:.3g}B parameters on {outlook.card.name}",
        f"{settings.batch_size} x {settings.max_length} tokens",
        f"rank {outlook.rank} on {len(step.targets)} modules of {outlook.blocks} layers",
        settings.optimizer,
        *([f"frozen model in {settings.quantization}"] if settings.quantization != "none" else []),
        *(["bf16 autocast"] if settings.bf16 else []),
    ]
    return ", ".join(parts)


def verdict_text(outlook: Outlook) -> str:
    """The verdict in one or two sentences."""
    best = outlook.best
    if best is None:
        tight = [choice for choice in outlook.choices if choice.use.verdict == "tight"]
        if tight:
            return (
                f"Tight: {choice_text(outlook, tight[0])} fits only without fragmentation. Set "
                "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or take a smaller batch."
            )
        least = min(outlook.choices, key=lambda choice: choice.use.total_bytes)
        return (
            f"Does not fit: the least of these, {choice_text(outlook, least)}, takes "
            f"{format_bytes(least.use.total_bytes, up=True)} of {format_bytes(outlook.card.memory_bytes)}."
            f"{_largest_text(outlook)}"
        )
    text = f"Fits with {format_bytes(best.use.spare_bytes)} to spare: {choice_text(outlook, best)}"
    return f"{text}{_time_text(outlook, best)}."


def _largest_text(outlook: Outlook) -> str:
    """What to do where the batch that was asked for does not fit."""
    fitting = [cell for cell in outlook.grid if cell.recomputed is not None]
    if not fitting:
        smaller = "--quantization nf4, " if outlook.settings.quantization != "nf4" else ""
        return f" No batch of the grid fits. Take {smaller}a smaller model or a larger card."
    largest = max(fitting, key=lambda cell: (cell.shape.rows * cell.shape.length, cell.shape.length))
    how = recomputed_text(outlook, largest.recomputed or 0)
    return f" The largest batch of the grid that fits all layers is {largest.shape}, with {how}."


def _time_text(outlook: Outlook, best: Choice) -> str:
    """A plan of fewer layers that is quicker than the best one, for comparison."""
    quicker = [each for each in outlook.choices if each.use.verdict == "fits" and each.time < 0.9 * best.time]
    text = f", at {best.time:.2f} of plain LoRA's time"
    if not quicker:
        return text
    other = max(quicker, key=lambda choice: (choice.layers, -len(choice.recomputed)))
    return f"{text}; {choice_text(outlook, other)} takes {other.time / best.time:.2f} of that"


def choice_text(outlook: Outlook, choice: Choice) -> str:
    """A choice in words."""
    where = "all layers" if choice.layers == outlook.blocks else f"the top {choice.layers} layers"
    return f"{where} at rank {choice.rank} with {recomputed_text(outlook, len(choice.recomputed))}"


def recomputed_text(outlook: Outlook, count: int) -> str:
    """How many layers run again, in words."""
    if not count:
        return "no checkpointing"
    return (
        "checkpointing"
        if count == len(outlook.recomputable)
        else f"{count} of {len(outlook.recomputable)} layers checkpointed"
    )


def choice_table(outlook: Outlook) -> Table:
    """All choices for the batch that was asked for."""
    columns = ("adapters", "rank", "run again", "step", "on card", "spare", "fits", "time")
    table = make_table("What each choice takes, in GiB", columns)
    previous: tuple[int, int] | None = None
    for choice in outlook.choices:
        if previous not in (None, (choice.layers, choice.rank)):
            table.add_section()
        previous = choice.layers, choice.rank
        use = choice.use
        table.add_row(
            "all layers" if choice.layers == outlook.blocks else f"top {choice.layers}",
            str(choice.rank),
            f"{len(choice.recomputed)} of {len(outlook.recomputable)}",
            *(
                f"{count / 2**30:.2f}".replace("-", "−")
                for count in (choice.step_bytes, use.total_bytes, use.spare_bytes)
            ),
            {"fits": "yes", "does not fit": "no"}.get(use.verdict, use.verdict),
            f"{choice.time:.2f}",
        )
    return table


def grid_table(outlook: Outlook) -> Table:
    """Which batches fit, for all layers at the rank that was asked for, by tokens and rows."""
    cells = outlook.grid
    rows = sorted({cell.shape.rows for cell in cells})
    title = f"Layers that must run again so that rank {outlook.rank} on all layers fits; – does not fit"
    table = make_table(title, ("tokens", *(f"{count} rows" if count > 1 else "1 row" for count in rows)))
    for length in sorted({cell.shape.length for cell in cells}):
        table.add_row(f"{length:,}", *(cell_text(cell) for cell in cells if cell.shape.length == length))
    return table


def cell_text(cell: GridCell) -> str:
    """A cell of the grid."""
    return "–" if cell.recomputed is None else "none" if not cell.recomputed else str(cell.recomputed)


def configuration_text(outlook: Outlook) -> str:
    """The best choice as Python: a LoraConfig, and what belongs into the training arguments.

    Raises:
        BudgetError: nothing fits.
    """
    best, settings = outlook.best, outlook.settings
    if best is None:
        raise BudgetError(verdict_text(outlook))
    names = [name.strip() for name in settings.target_modules.split(",")]
    modules = repr(names[0] if len(names) == 1 else names)
    if best.layers < outlook.blocks:
        modules = repr([target.name for target, rank in zip(outlook.step.targets, best.ranks, strict=True) if rank])
    checkpointed = 0 < len(best.recomputed) == len(outlook.recomputable)
    narrow = narrow_ranks(outlook, best)
    lines = [
        "from peft import LoraConfig",
        "",
        "lora = LoraConfig(",
        f"    r={best.rank},",
        f"    lora_alpha={2 * REFERENCE_RANK},",
        f"    target_modules={modules},",
        *([f"    rank_pattern={narrow},  # modules that are narrower than {best.rank}"] if narrow else []),
        ")",
        "arguments = dict(",
        f"    per_device_train_batch_size={settings.batch_size},",
        f"    gradient_accumulation_steps={settings.accumulation},",
        f"    bf16={settings.bf16},",
        f"    gradient_checkpointing={checkpointed},",
        "    gradient_checkpointing_kwargs={'use_reentrant': False},",
        ")",
    ]
    if 0 < len(best.recomputed) < len(outlook.recomputable):
        lines.append(
            f"# {len(best.recomputed)} layers run again: rankpilot.attach(trainer, recompute=True) chooses them inside "
            f"budget='{math.ceil(10 * best.step_bytes / 2**30) / 10:.1f}GiB'"
        )
    return "\n".join(lines)


def narrow_ranks(outlook: Outlook, choice: Choice) -> dict[str, int]:
    """The ranks of modules that are narrower than the rank of a choice, as `LoraConfig.rank_pattern` has them.

    By the end of their names ("k_proj") where all adapted modules of that end have one rank, else by the whole name.
    """
    ranks = {target.name: int(rank) for target, rank in zip(outlook.step.targets, choice.ranks, strict=True) if rank}
    ends: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        ends.setdefault(name.rpartition(".")[2], set()).add(rank)
    named = {name: name.rpartition(".")[2] for name in ranks}
    return {
        end if len(ends[end]) == 1 else name: ranks[name] for name, end in named.items() if ranks[name] < choice.rank
    }


def card_notes(outlook: Outlook) -> Iterator[str]:
    """How to read the figures."""
    taken = outlook.card.context_bytes + outlook.card.workspace_bytes
    yield (
        f"On the card: the frozen model ({format_bytes(outlook.step.frozen_bytes)}), CUDA's context and workspaces "
        f"({format_bytes(taken)}), the step, and what the allocator reserves beside it. Tight: it fits without that."
    )
    if not outlook.recomputable:
        name = type(outlook.step.model.get_base_model()).__name__
        yield f"{name} does not support gradient checkpointing: no layer can run again."
    whose = "" if outlook.card.rates else f" and the rates of an {USUAL_CARD}"
    yield f"Time: a step's share of plain LoRA's (rank 8 on all modules, no layer runs again), by counted work{whose}."


def card_figures(outlook: Outlook) -> dict[str, Any]:
    """All figures, as JSON values."""
    best = outlook.best
    return {
        "card": outlook.card.name,
        "memory_bytes": outlook.card.memory_bytes,
        "context_bytes": outlook.card.context_bytes,
        "workspace_bytes": outlook.card.workspace_bytes,
        "parameters": outlook.step.parameters,
        "frozen_bytes": outlook.step.frozen_bytes,
        "rows": outlook.settings.batch_size,
        "length": outlook.settings.max_length,
        "rank": outlook.rank,
        "layers": outlook.blocks,
        "verdict": verdict_text(outlook),
        "fits": best is not None,
        "choices": [
            {
                "layers": choice.layers,
                "rank": choice.rank,
                "recomputed": len(choice.recomputed),
                "step_bytes": choice.step_bytes,
                "total_bytes": choice.use.total_bytes,
                "spare_bytes": choice.use.spare_bytes,
                "verdict": choice.use.verdict,
                "time": choice.time,
            }
            for choice in outlook.choices
        ],
        "grid": [
            {
                "rows": cell.shape.rows,
                "length": cell.shape.length,
                "recomputed": cell.recomputed,
                "bytes": cell.bytes,
            }
            for cell in outlook.grid
        ],
    }


def write_card_report(outlook: Outlook, folder: Path) -> None:
    """Write memory.json and memory.png; existing ones are replaced."""
    write_json(folder / "memory.json", card_figures(outlook))
    save_figure(card_picture(outlook), folder / "memory.png")
