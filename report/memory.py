"""Report on an `Outlook`, and the files of `rankpilot memory`: memory.json and memory.png.

It contains the subject and the verdict in words, one table of choices, the batches that fit, and all figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ..common.drawing import save_figure
from ..common.errors import BudgetError, UnsupportedError
from ..common.files import write_json
from ..common.text import byte_unit, format_bytes, make_table, plural
from ..cost.breakdown import KINDS
from ..cost.cards import USUAL_CARD
from ..cost.forecast.outlook import Choice, GridCell, Outlook, checkpointed_bytes
from ..cost.forecast.pictures_that_fit import largest_max_pixels
from ..cost.forecast.what_else import brought_by_offloading, brought_by_streaming, least_use
from ..cost.savers.prices import ACTIVATIONS, Saved
from ..lora.spec import REFERENCE_RANK, absent, is_pattern
from .config import MemoryConfig
from .doubts import doubts, of_loading
from .moments import highest_moment, moments_of, moments_table, too_large_evaluation, uncounted_moments
from .picture import KINDS_SHOWN, memory_picture
from .rollouts import engine_figures, rollouts_text

if TYPE_CHECKING:
    from .lengths import StepsOfLengths


def fits(outlook: Outlook) -> bool:
    """Return True if the run as requested fits its card, if need be with a streamed base."""
    if too_large_evaluation(outlook):
        return False
    return bool(outlook.as_asked or brought_by_streaming(outlook))


def headline(outlook: Outlook) -> str:
    """Return a line with the verdict on the run as requested, its bytes and settings."""
    card, asked, streamed = outlook.card, outlook.as_asked, brought_by_streaming(outlook)
    if asked and not too_large_evaluation(outlook):
        word = str(asked.verdict).capitalize()
    elif streamed:
        asked, word = streamed.as_asked, f"Fits with {plural(streamed.streamed, 'layer')} streamed"
    else:
        asked, word = None, "Does not fit"
    total = asked.use.total_bytes if asked else least_use(outlook)
    shape, how = outlook.memory.shape, outlook.settings.quantization
    unit, size = byte_unit(card.memory_bytes)
    run = [f"{shape.rows} x {shape.length:,} tokens", f"rank {outlook.rank}", *([how] if how != "none" else [])]
    taken = f"{total / size:.1f} of {card.memory_bytes / size:.1f} {unit}"
    return f"{word}: {'vLLM would not start' if outlook.engine_lacks > 0 else taken} ({', '.join(run)}).\n"


def subject(outlook: Outlook, config: MemoryConfig, kind: str = "") -> str:
    """Return the subject in one line; `kind` is the kind of training in a trainer's file."""
    step, settings, shape = outlook.step, outlook.settings, outlook.memory.shape
    billions = step.model.parameters / 1e9
    where, shards = outlook.card.name, outlook.shards
    if shards.gpus > 1:
        where = f"{shards.gpus} x {where} under {shards.sharding}, all figures per GPU"
    parts = [
        Path(config.model).name,
        *([kind] if kind else []),
        f"{f'{billions:.3g}B' if billions >= 1 else f'{1e3 * billions:.3g}M'} parameters on {where}",
        f"{shape.rows} x {shape.length} tokens",
        f"rank {outlook.rank} on {len(step.targets)} modules of {outlook.blocks} layers{_absent_text(outlook)}",
        settings.optimizer,
        *([f"frozen model in {settings.quantization}"] if settings.quantization != "none" else []),
        *([_experts_text(outlook)] if step.model.fused and settings.quantization != "none" else []),
        *(["loaded in fp32"] if outlook.dtype == "fp32" else []),
        *(["gradients accumulated"] if settings.accumulation > 1 else []),
        *(["bf16 autocast"] if settings.bf16 else []),
        *(["gradient checkpointing"] if config.gradient_checkpointing is True else []),
        *(text for name, text in _AS_LOADED if getattr(step.loaded, name)),
        *([_pictures_text(outlook)] if step.loaded.image else []),
        *([f"{plural(outlook.streamed, 'layer')} streamed"] if outlook.streamed else []),
        *([_LOSSES[step.loaded.loss]] if step.loaded.loss in _LOSSES else []),
        *([f"{step.loaded.implementation} attention"] if step.loaded.implementation else []),
    ]
    return ", ".join(parts)


_LOSSES = {"chunked": "TRL's chunked loss", "cut": "cut cross-entropy", "liger": "Liger's loss"}
"""Losses to mention."""

_AS_LOADED = (("packed", "packed rows"), ("reentrant", "use_reentrant"), ("offload", "offloaded activations"))
"""Settings of `LoadedAs` to mention when set."""


def _pictures_text(outlook: Outlook) -> str:
    """Return the pictures of a row, and the share of its tokens that they take."""
    model, loaded = outlook.step.model, outlook.step.loaded
    scaled = f" (scaled to {model.pixels:,} pixels)" if model.pixels else ""
    each = f"{plural(loaded.images, 'picture')} of {loaded.image}{scaled} per row"
    return f"{each} in {model.picture_tokens:,} of its tokens"


def _absent_text(outlook: Outlook) -> str:
    """Return the requested target modules that do not exist."""
    asked = outlook.settings.target_modules
    names = [] if asked == "all-linear" or is_pattern(asked) else [name.strip() for name in asked.split(",")]
    missing = absent(names, (target.name for target in outlook.step.targets))
    return f" (no module is named {', '.join(missing)})" if missing else ""


def _experts_text(outlook: Outlook) -> str:
    """Describe how a quantised model stores fused experts."""
    bits = outlook.settings.quantization
    return {
        "transformers": "experts in 16 bits, as in transformers",
        "axolotl": f"experts in {bits}, as with axolotl's quantize_moe_experts",
        "unsloth": f"experts in {bits}, as in Unsloth",
    }[outlook.step.loaded.experts]


def _prepared(prepares: bool) -> str:
    """Describe how a quantised model is prepared."""
    how = "after" if prepares else "without"
    return f"{how} prepare_model_for_kbit_training, which keeps unquantised weights in fp32"


def _offload_text(outlook: Outlook) -> str:
    """Describe the benefit of offloading checkpointed inputs, if not all layers fit without it."""
    if (found := brought_by_offloading(outlook)) is None:
        return ""
    fits = f"adapters on all layers fit with {format_bytes(found[0])} to spare"
    costs = f"are kept in main memory, and copying them adds at most {found[1]:.2g} s per step"
    return f" With activation_offloading (TRL, axolotl), {fits}: inputs of checkpointed layers {costs}."


def verdict_text(outlook: Outlook) -> str:
    """Return the result in a few sentences."""
    how, prepares = outlook.settings.quantization, outlook.settings.prepare_kbit
    other = "--no-prepare-kbit takes less, as TRL's SFTTrainer does" if prepares else "--prepare-kbit takes more"
    prepared = "" if how == "none" else f" The {how} model is trained {_prepared(prepares)} ({other})."
    plain, again = outlook.reference_bytes, checkpointed_bytes(outlook)
    both = f", and {format_bytes(again)} with all layers checkpointed" if again and again < plain else ""
    what = "Rank" if outlook.rank == REFERENCE_RANK else "For comparison, plain LoRA at rank"
    told = f" {what} {REFERENCE_RANK} on all modules takes {format_bytes(plain)} per step{both}."
    found = too_large_evaluation(outlook) or _fit(outlook) + highest_moment(outlook)
    if engine := rollouts_text(outlook):
        if outlook.engine_lacks > 0:
            return f"Does not fit: vLLM would not start. {engine}{told}{prepared}"
        found += f" {engine}"
    return f"{found}{_offload_text(outlook)}{told}{prepared}"


def _fit(outlook: Outlook) -> str:
    """Describe whether the run as requested fits the card, and what fits instead."""
    asked, instead, card = outlook.as_asked, outlook.instead, outlook.card
    if asked is None:
        smallest = choice_text(outlook, outlook.main)
        takes = f"{format_bytes(least_use(outlook), up=True)} of {format_bytes(card.memory_bytes)}"
        if streamed := brought_by_streaming(outlook):
            return f"{_streamed_text(streamed)} Without streaming, {smallest} takes {takes}."
        if outlook.main.verdict == "may not fit":
            advice = "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or use a smaller batch."
            return f"Does not fit: {smallest} fits only without fragmentation. {advice}"
        told = f"Does not fit: {smallest} takes {takes}."
        if instead:
            spare = format_bytes(instead.use.spare_bytes)
            told += f" What fits: {choice_text(outlook, instead)}, with {spare} to spare."
        return f"{told}{_largest_text(outlook)}"
    spare, needed = format_bytes(asked.use.spare_bytes), format_bytes(outlook.slack * card.memory_bytes)
    if asked.verdict == "may not fit":
        told = f"May not fit: {choice_text(outlook, asked)} leaves {spare} free, and runs of this kind took up to"
        return f"{told} {needed} ({outlook.slack:.0%} of the card) more than predicted.{_largest_text(outlook)}"
    return f"Fits with {spare} to spare: {choice_text(outlook, asked)}{_time_text(outlook, asked)}."


def _streamed_text(outlook: Outlook) -> str:
    """Describe the request with a streamed base, which fits."""
    choice, layers = outlook.fitting(outlook.blocks, outlook.rank), plural(outlook.streamed, "layer")
    there = f"(stream={outlook.streamed}; {format_bytes(outlook.streamed * outlook.base.layer_bytes)} there)"
    time = "" if choice.time is None else f", at {choice.time:.2f}x plain LoRA's step time"
    with_layers = f"with the frozen weights of {layers} streamed from main memory {there}"
    return f"Fits {with_layers}: {choice_text(outlook, choice)}, {format_bytes(choice.use.spare_bytes)} to spare{time}."


def _largest_text(outlook: Outlook) -> str:
    """Suggest a remedy if the requested batch does not fit."""
    fitting = [cell for cell in outlook.grid if cell.checkpointed is not None]
    if not fitting:
        linear = 2 * outlook.step.model.fused < outlook.step.model.parameters
        smaller = "--quantization nf4, " if outlook.settings.quantization != "nf4" and linear else ""
        return f" No batch of the grid fits. Use {smaller}a smaller model or a larger card."
    largest = max(fitting, key=lambda cell: (cell.shape.rows * cell.shape.length, cell.shape.length))
    how = _checkpointed_text(outlook, largest.checkpointed or 0, largest.activations)
    return f" The largest batch that fits with adapters on all layers is {largest.shape}, with {how}."


def _time_text(outlook: Outlook, best: Choice) -> str:
    """Name a faster plan with fewer layers than the best one, for comparison."""
    if best.time is None:
        return ""
    text = f", at {best.time:.2f}x the step time of plain LoRA without checkpointing"
    for other in outlook.by_depth():
        if other.time is not None and other.time < 0.9 * best.time and other.fits:
            return f"{text}. Faster, with fewer adapters: {choice_text(outlook, other)}, at {other.time:.2f}x"
    return text


def choice_text(outlook: Outlook, choice: Choice) -> str:
    """Describe a choice in words."""
    where = "all layers" if choice.layers == outlook.blocks else f"the top {choice.layers} layers"
    how = _checkpointed_text(outlook, len(choice.checkpointed), _activations(outlook))
    return f"{where} at rank {choice.rank} with {how}"


def _activations(outlook: Outlook) -> bool:
    """True if every choice uses selective checkpointing."""
    return any(each.name == ACTIVATIONS for each in outlook.step.saved)


def _checkpointed_text(outlook: Outlook, count: int, activations: bool) -> str:
    """Describe the checkpointing: the number of layers, and selective checkpointing of activations."""
    every = len(outlook.checkpointable)
    layers = [] if not count else ["checkpointing" if count == every else f"{count} of {every} layers checkpointed"]
    return " and ".join([*layers, *([ACTIVATIONS] if activations else [])]) or "no checkpointing"


def row_label(outlook: Outlook, choice: Choice) -> str:
    """Return the layers with adapters under a choice."""
    return "all layers" if choice.layers == outlook.blocks else f"top {choice.layers} layers"


_SHORT = {"fits": "yes", "may not fit": "maybe", "does not fit": "no"}
"""Verdicts in tables."""


def choice_table(outlook: Outlook) -> Table:
    """Tabulate all choices: bytes of a step, those on the card, fit, and time, if known."""
    previous = outlook.choices[0]
    unit, size = byte_unit(outlook.card.memory_bytes)
    columns = ["adapters", "rank", "checkpointed", "step", "on card", "spare", "fits"]
    table = make_table(f"Memory of each choice, in {unit}", columns + ["time"] * (previous.time is not None))
    for choice in outlook.choices:
        if choice.kind != previous.kind or (choice.kind == "depth" and choice.layers != previous.layers):
            table.add_section()
        previous = choice
        figures = [size_of / size for size_of in (choice.step_bytes, choice.use.total_bytes, choice.use.spare_bytes)]
        table.add_row(
            row_label(outlook, choice),
            str(choice.rank),
            f"{len(choice.checkpointed)} of {len(outlook.checkpointable)}",
            *(f"{count:.2f}".replace("-", "−") for count in figures),
            _SHORT[choice.verdict],
            *([f"{choice.time:.2f}"] if choice.time is not None else []),
        )
    return table


def tables(outlook: Outlook) -> tuple[Table, Table]:
    """Return the tables of choices, and of the moments of a run under the main one."""
    return choice_table(outlook), moments_table(outlook, outlook.main)


def saver_rows(saved: Sequence[Saved]) -> list[list[str]]:
    """Return a header and a row for each plain LoRA step, without exact savers and with them."""
    unit, size = byte_unit(saved[0].step_bytes)
    rows = [[f"step, in {unit}", "no checkpointing", "all checkpointed"]]
    for number, each in enumerate(saved):
        peaks = [f"{each.step_bytes / size:.2f}", "–" if each.again_bytes is None else f"{each.again_bytes / size:.2f}"]
        rows.append([f"+ {each.name}" if number else each.name, *peaks])
    return rows if saved[0].again_bytes is not None else [row[:2] for row in rows]


def saver_table(saved: Sequence[Saved]) -> Table:
    """Return the same as a terminal table."""
    head, *rows = saver_rows(saved)
    table = make_table("Same losses in less memory: plain LoRA, rank 8 on all modules", head, first_wraps=True)
    for name, *peaks in rows:
        table.add_row(escape(name), *peaks)
    return table


def grid_table(outlook: Outlook) -> Table:
    """Tabulate the batches that fit the card, with all layers at the requested rank, by tokens and rows."""
    cells = outlook.grid
    rows = sorted({cell.shape.rows for cell in cells})
    fits = f"to fit rank {outlook.rank} on all layers ({outlook.slack:.0%} to spare)"
    title = f"Layers to checkpoint {fits}; * with selective checkpointing; – does not fit"
    table = make_table(title, ("tokens", *(f"{count} rows" if count > 1 else "1 row" for count in rows)))
    for length in sorted({cell.shape.length for cell in cells}):
        table.add_row(f"{length:,}", *(_cell_text(cell) for cell in cells if cell.shape.length == length))
    return table


def _cell_text(cell: GridCell) -> str:
    if cell.checkpointed is None:
        return "–"
    return f"{cell.checkpointed}*" if cell.activations else str(cell.checkpointed or "none")


def notes(outlook: Outlook) -> Iterator[str]:
    """Yield the bytes of the main choice by kind, and notes on reading the rest."""
    breakdown = outlook.breakdown(outlook.main)
    kinds = sorted((kind for kind in KINDS if breakdown.of_kind(kind)), key=breakdown.of_kind, reverse=True)
    parts = [f"{format_bytes(breakdown.of_kind(kind))} {KINDS_SHOWN[kind].words}" for kind in kinds]
    parts += [f"{format_bytes(breakdown.margin)} safety margin"] if breakdown.margin else []
    peak = f"{format_bytes(breakdown.total)} ({_moment_text(breakdown.label)})"
    yield f"The peak with {choice_text(outlook, outlook.main)} is {peak}: {'; '.join(parts)}."
    frozen = format_bytes(outlook.step.model.frozen_bytes)
    taken = format_bytes(outlook.card.context_bytes + outlook.card.workspace_bytes)
    rest = f"CUDA's context and workspaces ({taken}), the step, and the allocator's reserve"
    free = f"less than {outlook.slack:.0%} of the card free, which is within the prediction error"
    told = f"Counted on the card: the frozen model ({frozen}), {rest}."
    yield f"{told} Choices that may not fit leave {free}, or fit only without that reserve."
    if (model := outlook.step.model).fused:
        routed = "The memory of a step does not depend on how tokens are routed."
        yield f"{model.fused / model.parameters:.0%} of the weights are fused experts. {routed}"
    seconds, shape = f" and the rates of an {USUAL_CARD}.", outlook.memory.shape
    if outlook.card.rates:
        seconds = f", about {outlook.plain_seconds:.2g} s for {shape.rows} x {shape.length} tokens, "
        seconds += "if the card is as efficient as an A100 or an L40S in published runs."
    plain = "plain LoRA (rank 8 on all modules, no checkpointing)"
    yield f"Time: relative to {plain}, estimated from operation counts{seconds}"
    if _activations(outlook):
        uses = "all choices use selective checkpointing, as a run would (gradient_checkpointing='auto')"
        slower = "the same losses, a few percent slower"
        yield f"Plain LoRA does not fit comfortably with the free savers, so {uses}: {slower}."


def remarks(outlook: Outlook) -> Iterator[str]:
    """Yield other ways to load the model, and what is not counted as asked."""
    if not outlook.checkpointable:
        yield f"{outlook.step.model.kind} does not support gradient checkpointing."
    yield from of_loading(outlook)
    yield from uncounted_moments(outlook)


def max_pixels_text(outlook: Outlook, ask: Callable[..., Outlook]) -> str:
    """Return the largest `max_pixels` that fits; see `largest_max_pixels`."""
    found, loaded = largest_max_pixels(outlook, ask), outlook.step.loaded
    text = outlook.settings.max_length - outlook.step.model.picture_tokens
    beside = f"{plural(loaded.images, 'picture')} and {text:,} tokens of text per row"
    return f"No max_pixels fits with {beside}." if found is None else f"max_pixels={found} fits with {beside}."


def _moment_text(label: str) -> str:
    """Return the name of a moment of the step, without the names of the wrappers."""
    phase, colon, place = label.partition(": ")
    place = place.removeprefix("base_model.model").removeprefix(".").removesuffix(".base_layer")
    return f"{phase}: {place or 'loss'}" if colon else phase


def configuration_text(outlook: Outlook) -> str:
    """Return the request as it fits as Python code, or else what fits: a LoraConfig and the training arguments.

    Raises:
        BudgetError: nothing fits.
    """
    best, settings = outlook.as_asked or outlook.instead, outlook.settings
    if best is None:
        raise BudgetError(verdict_text(outlook))
    names = [name.strip() for name in settings.target_modules.split(",")]
    if names == ["all-linear"] and outlook.step.model.named:
        names = list(outlook.step.model.named)
    modules = repr(names[0] if len(names) == 1 else names)
    if best.layers < outlook.blocks:
        modules = repr([target.name for target, rank in zip(outlook.step.targets, best.ranks, strict=True) if rank])
    activations = _activations(outlook)  # only used if a run selects the checkpointed layers
    checkpointed = not activations and 0 < len(best.checkpointed) == len(outlook.checkpointable)
    narrow, model = _narrow_ranks(outlook, best), outlook.step.model
    lines = [
        "from peft import LoraConfig",
        "",
        *([] if settings.quantization == "none" else [f"# The model is trained {_prepared(settings.prepare_kbit)}."]),
        "lora = LoraConfig(",
        f"    r={best.rank},",
        f"    lora_alpha={2 * REFERENCE_RANK},",
        f"    target_modules={modules},",
        *([f"    rank_pattern={narrow},  # modules narrower than {best.rank}"] if narrow else []),
        *([f"    task_type={model.task_type!r},"] if model.saved_modules else []),
        *([f"    modules_to_save={list(model.saved_modules)},"] if model.saved_modules else []),
        ")",
        "arguments = dict(",
        f"    per_device_train_batch_size={settings.batch_size},",
        f"    gradient_accumulation_steps={settings.accumulation},",
        f"    bf16={settings.bf16},",
        f"    gradient_checkpointing={checkpointed},",
        "    gradient_checkpointing_kwargs={'use_reentrant': False},",
        ")",
    ]
    if activations or 0 < len(best.checkpointed) < len(outlook.checkpointable):
        again = [ACTIVATIONS] if activations else []
        again += [f"gradient checkpointing of {len(best.checkpointed)} layers"] if best.checkpointed else []
        room = best.step_bytes + best.use.spare_bytes
        budget = min(math.ceil(best.step_bytes / 2**20), int(room / 2**20))  # in MiB, no more than the card has
        lines.append(f"# With {' and '.join(again)}, which attach(trainer) enables under budget='{budget}MiB step'")
    return "\n".join(lines)


def _narrow_ranks(outlook: Outlook, choice: Choice) -> dict[str, int]:
    """Return the ranks of modules narrower than the rank of a choice, for `LoraConfig.rank_pattern`.

    Keys are the ends of their names ("k_proj") if all adapted modules with that end have one rank, else full names.
    """
    ranks = {target.name: int(rank) for target, rank in zip(outlook.step.targets, choice.ranks, strict=True) if rank}
    ends: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        ends.setdefault(name.rpartition(".")[2], set()).add(rank)
    narrow = [(name.rpartition(".")[2], name) for name, rank in ranks.items() if rank < choice.rank]
    return {end if len(ends[end]) == 1 else name: ranks[name] for end, name in narrow}


SCHEMA = 1
"""The version of the result of `figures`, described in docs/command-line.md: adding fields keeps it, renaming or
removing one increments it.
"""


def figures(outlook: Outlook) -> dict[str, Any]:
    """Return all figures as JSON values."""
    breakdown, shape, card = outlook.breakdown(outlook.main), outlook.memory.shape, outlook.card
    rows = zip(breakdown.layers, breakdown.bytes.tolist(), strict=True)
    return {
        "schema": SCHEMA,
        "card": card.name,
        **asdict(outlook.shards),
        **{name: getattr(card, name) for name in ("memory_bytes", "context_bytes", "workspace_bytes")},
        "libraries": dict(outlook.step.libraries),
        "parameters": outlook.step.model.parameters,
        "frozen_bytes": outlook.step.model.frozen_bytes,
        "picture_tokens": outlook.step.model.picture_tokens,
        "picture_bytes": outlook.settings.batch_size * outlook.step.model.picture_bytes,
        "streamed": outlook.streamed,
        "main_memory_bytes": outlook.streamed * outlook.base.layer_bytes,
        **asdict(shape),
        "rank": outlook.rank,
        "blocks": outlook.blocks,
        "verdict": verdict_text(outlook),
        "fits": fits(outlook),
        "peak_bytes": breakdown.total,
        "reference_bytes": outlook.reference_bytes,
        "checkpointed_bytes": checkpointed_bytes(outlook),
        "exact_savers": [asdict(each) for each in outlook.step.saved],
        "limit_bytes": card.memory_bytes,
        "moment": breakdown.label,
        "margin_bytes": breakdown.margin,
        "kinds": {kind: breakdown.of_kind(kind) for kind in KINDS},
        "layers": [{"layer": layer, **dict(zip(KINDS, row, strict=True))} for layer, row in rows],
        "moments": [asdict(moment) for moment in moments_of(outlook, outlook.main)],
        "engine": engine_figures(outlook),
        "choices": [_figures_of(outlook, choice) for choice in outlook.choices],
        "grid": [cell.pop("shape") | cell for cell in map(asdict, outlook.grid)],
        "doubts": [asdict(each) for each in doubts(outlook)],
    }


def _figures_of(outlook: Outlook, choice: Choice) -> dict[str, Any]:
    """Return the figures of one choice."""
    return {
        "kind": choice.kind,
        "label": choice_text(outlook, choice),
        "layers": choice.layers,
        "rank": choice.rank,
        "checkpointed": len(choice.checkpointed),
        "step_bytes": choice.step_bytes,
        "share": choice.step_bytes / outlook.reference_bytes,
        "total_bytes": choice.use.total_bytes,
        "spare_bytes": choice.use.spare_bytes,
        "verdict": choice.verdict,
        "time": choice.time,
        "ranks": {target.name: rank for target, rank in zip(outlook.step.targets, choice.ranks.tolist(), strict=True)},
    }


def write_memory_report(
    outlook: Outlook,
    config: MemoryConfig,
    folder: Path,
    lengths: StepsOfLengths | None = None,
) -> str:
    """Write memory.json and, with matplotlib, memory.png and the picture of lengths; returns a line about them.

    Existing files are replaced.
    """
    told = figures(outlook)
    if lengths:
        from .lengths import lengths_figures, lengths_picture

        told["lengths"] = lengths_figures(lengths)
    write_json(folder / "memory.json", told)
    try:
        if lengths:
            save_figure(lengths_picture(lengths), folder / "lengths.png")
        save_figure(memory_picture(outlook, picture_labels(outlook), subject(outlook, config)), folder / "memory.png")
    except UnsupportedError as error:
        return f"All figures: {folder}. {error}"
    return f"Picture and all figures: {folder}"


def picture_labels(outlook: Outlook) -> list[str]:
    """Return the labels of the choices' bars."""
    again = len(outlook.checkpointable)
    labels = []
    for choice in outlook.choices:
        checkpointed = f", {len(choice.checkpointed)} of {again} checkpointed" if choice.checkpointed else ""
        labels.append(f"{row_label(outlook, choice)}, rank {choice.rank}{checkpointed}")
    return labels
