"""`python -m benchmarks pictures`: the pictures of the documentation, drawn again from stored rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.common.files import read_object, write_text
from rankpilot.cost.part_seconds import PartSeconds
from rankpilot.decide.plan.parts import plan_parts
from rich.console import Console

from . import drawing, rates
from .drawing import Curve, Interval, Picture, Stack
from .harness import Figures, padding_share
from .pages import PARTS, ROOT, parts_of_whole, without_a_sweep

RESULTS = Path(__file__).parent / "results"
STEP = RESULTS / "step.json"
"""What `rankpilot memory` answers about the bars of the first picture, of these options."""

FOLDER = ROOT / "docs" / "images"

MODEL, CARD = "llama-3.1-8b", "RTX 4090"

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Draw the pictures of the documentation again, from stored rows.

    Attributes:
        ask: ask `rankpilot memory` again for the picture of a step, and store what it answers.
        json: also write the names of the pictures that were out of date to this file.
    """

    ask: bool = False
    json: Path | None = None


# The step -------------------------------------------------------------------------------------------------------------


def ask() -> dict[str, Any]:
    """What a step of an 8B takes of a card, by choice: GiB of live tensors and on the card, and the share of time."""
    import rankpilot

    found = {}
    plain: dict[str, Any] = {"exact_savers": False, "gradient_checkpointing": False}
    checkpointed = plain | {"gradient_checkpointing": True}
    for name, options, layers, rank, least in (
        ("plain LoRA", plain, 32, 8, 0),
        ("plain LoRA, all layers checkpointed", checkpointed, 32, 8, 32),
        ("savers, 7 of 32 layers checkpointed", {}, 32, 8, 1),
        ("savers, all layers checkpointed", {}, 32, 8, 32),
        ("savers, rank 64, 18 layers checkpointed", {}, 32, 64, 1),
        ("savers, adapters on the top 24 layers", {}, 24, 8, 0),
    ):
        outlook = rankpilot.memory_of(MODEL, CARD, **options)
        choice = next(
            each
            for each in outlook.choices
            if (each.layers, each.rank) == (layers, rank) and len(each.checkpointed) >= least
        )
        assert choice.use
        assert choice.time
        found[name] = {
            "step": round(choice.step_bytes / GIB, 2),
            "card": round(choice.use.total_bytes / GIB, 2),
            "time": round(choice.time, 2),
        }
        assert outlook.card
        frozen, limit = choice.use.base_bytes / GIB, outlook.card.memory_bytes / GIB
    return {"frozen": round(frozen, 2), "limit": round(limit, 2), "rows": found}


def step() -> str:
    """What one step takes of a card, by choice."""
    stored = read_object(STEP)
    frozen, limit = stored["frozen"], stored["limit"]
    rows = [
        Stack(
            name,
            (
                ("d", frozen),
                ("c" if name.startswith("savers") else "a", row["step"]),
                ("pale", row["card"] - frozen - row["step"]),
            ),
            (f"{row['card']:.1f} GiB", f"{row['time']:.2f}"),
        )
        for name, row in stored["rows"].items()
    ]
    picture = Picture(
        "What one training step of Llama-3.1-8B takes of an RTX 4090",
        "In GiB: bf16, 2 rows of 1,024 tokens, rank 8 on all linear layers, AdamW. Time is relative to plain LoRA.",
    )
    legend = (
        ("d", "frozen model"),
        ("a", "step of plain LoRA"),
        ("c", "step with exact savers"),
        ("pale", "allocator's reserve, CUDA context"),
    )
    return drawing.stacks(
        picture,
        rows,
        heads=("on the card", "time"),
        legend=legend,
        limit=(limit, f"{limit:.1f} GiB"),
        left=280,
    )


# Losses ---------------------------------------------------------------------------------------------------------------


def _measured(words: str, key: str, kind: str = "a") -> Interval:
    """A choice on models of width 64, or what rankpilot does there ("c")."""
    figures = without_a_sweep()
    value, low, high = (float(figures[f"{key}: {name}"]) for name in ("value", "low", "high"))
    return Interval(words, value, low, high, kind)


def choices() -> str:
    """What single choices are worth in held-out loss."""
    whole = {
        (part, least): Interval(PARTS[part], float(np.mean(losses)), min(losses), max(losses), "b")
        for part, least, _, losses in parts_of_whole()
    }
    ranks = [
        replace(row, name=f"{'rank 4' if low == 4 else 'ranks 16 to 128'}, SmolLM2-135M")
        for (part, low), row in whole.items()
        if part == "all"
    ]
    small = partial("byte models, admitted, {}".format)
    groups: list[tuple[str, Sequence[Interval]]] = [
        (
            "Learning rate",
            (
                _measured("3e-4 on narrow models", small("usual")),
                _measured("four times the best", "plain at 4"),
                _measured("four times, with control", "controlled at 4", "c"),
                _measured("a quarter of the best", "plain at 0.25"),
                _measured("a quarter, with control", "controlled at 0.25", "c"),
                _measured('learning_rate="auto"', small("auto"), "c"),
            ),
        ),
        ("Coverage, SmolLM2-135M", [row for (part, low), row in whole.items() if part != "all"]),
        ("Rank", (*ranks, _measured("rank 64 with rsLoRA", small("rslora-64")))),
        (
            "Methods at a mean rank of 8",
            (
                *(_measured(name, small(name)) for name in ("Prodigy", "AdaLoRA", "LoRA+", "EVA")),
                _measured('goal="quality"', small("quality"), "c"),
            ),
        ),
    ]
    picture = Picture(
        "What a choice is worth: held-out loss versus plain LoRA at its best rate",
        "Left is better. Width 64 with 95 % intervals; green: rankpilot; orange: SmolLM2-135M, least to most.",
    )
    return drawing.intervals(picture, groups, ends=(-6, 32))


def control() -> str:
    """A wrong rate that is left alone, and that is corrected."""
    figures = without_a_sweep()
    sides = {
        "plain": ("d", "left alone"),
        "controlled": ("c", "control"),
        "hypergradient, .3": ("a", "hypergradient"),
        "forks": ("e", "forks"),
        "reduced on a plateau": ("b", "ReduceLROnPlateau"),
    }
    starts = {
        0.25: "begins at a quarter of the best",
        1.0: "begins at about the best",
        4.0: "begins at four times the best",
    }
    groups = [
        (words, [(kind, float(figures[f"{side} at {factor:g}: value"])) for side, (kind, _) in sides.items()])
        for factor, words in starts.items()
    ]
    picture = Picture(
        "Log loss above that of the best learning rate, in per cent",
        "Mean of 8 texts, models of width 64, 200 steps, the same batches. Lower is better.",
    )
    return drawing.grouped(picture, groups, list(sides.values()))


OCTAVES = np.arange(-3, 3)


def wrong_rates() -> str:
    """The mean loss above the best, by how far the rate is from the best of each sweep."""
    rows = []
    for name, kind, sweeps in (
        ("models of width 32 and 64", "a", [*rates.packed()]),
        ("SmolLM2-135M", "b", [*rates.whole()]),
        ("published, 1B to 685B", "e", [*rates.published()]),
    ):
        points = []
        for octave in OCTAVES:
            tried = [(sweep, sweep.best * 2.0**octave) for sweep in sweeps]
            inside = [s.regret(rate) for s, rate in tried if min(s.losses) * 0.99 <= rate <= max(s.losses) * 1.01]
            if len(inside) >= 5:
                points.append((float(octave), float(np.mean(inside))))
        rows.append(Curve(name, kind, tuple(points)))
    picture = Picture(
        "A rate that is too high costs more than one that is too low",
        "Mean loss above the best rate of each sweep, read off between the rates that were run.",
    )
    names = {-3: "an eighth", -2: "a quarter", -1: "half", 0: "the best rate", 1: "twice", 2: "four times"}
    return drawing.curves(
        picture, rows, ticks=[(float(k), v) for k, v in names.items()], most=30, below="learning rate of plain LoRA"
    )


# Diagrams -------------------------------------------------------------------------------------------------------------

BATCH = (192, 45, 29, 15, 189, 33, 128, 159, 19, 16, 63, 35, 163, 59, 8, 28)
"""Tokens of sixteen functions of Python's standard library."""


def split() -> str:
    """One batch as a rectangle, and in the parts of the planner where a launch takes as long as 150 tokens."""
    lengths = np.array(BATCH)
    seconds = PartSeconds(of_token=1.0, attention=0.0, launches=150.0, overlaps=False, layers=0)

    def bytes_of(rows: IntArray, tokens: IntArray, layers: int) -> FloatArray:
        return (rows * tokens).astype(np.float64)

    parts = plan_parts(lengths, float("inf"), (0,), bytes_of, seconds)
    saved = padding_share(lengths, parts)
    picture = Picture(
        f"One batch of 16 rows: as a rectangle, and in {len(parts)} parts without {100 * saved:.0f} % of the padding",
        "Each bar is a row; blue are its tokens, grey is padding. The gradient is the same.",
    )
    tall, wide, top = 13, 330 / max(BATCH), 92
    picture.text(20, top - 12, f"{len(BATCH)} x {max(BATCH)} tokens", "bold")
    picture.text(400, top - 12, ", ".join(f"{len(part.rows)} x {part.length}" for part in parts) + " tokens", "bold")
    for index, length in enumerate(BATCH):
        y = top + tall * index
        picture.box(20, y, wide * max(BATCH), tall - 3, "pale")
        picture.box(20, y, wide * length, tall - 3, "a")
    at = float(top)
    for part in parts:
        for row in sorted(part.rows, key=lambda row: -BATCH[row]):
            picture.box(400, at, wide * part.length, tall - 3, "pale")
            picture.box(400, at, wide * BATCH[row], tall - 3, "a")
            at += tall
        at += 10
    return picture.svg(at + 14)


def environment() -> str:
    """State, action and reward of the environment."""
    picture = Picture(
        "One episode: a short fine-tune, and an agent that steers it at twelve moments",
        "A group is one kind of module in one third of the layers.",
    )

    def lines(x: float, y: float, words: Sequence[str], kind: str = "") -> None:
        for line, told in enumerate(words):
            picture.text(x, y + 20 * line, told, kind, at="middle")

    picture.box(20, 126, 208, 140, "box", round=8)
    picture.text(124, 168, "Fine-tune", "bold", at="middle")
    lines(124, 192, ("a small transformer with", "LoRA adapters, inside", "its budget"))
    picture.box(552, 126, 188, 140, "box", round=8)
    picture.text(646, 178, "Agent", "bold", at="middle")
    lines(646, 202, ("MaskablePPO, a rule,", "or a policy of yours"))
    picture.arrow([(124, 126), (124, 98), (646, 98), (646, 124)])
    picture.text(390, 90, "State", "bold", at="middle")
    state = "of each group: rank, cost, gradient signals,", "what its last change did to the loss;"
    lines(390, 118, (*state, "of the run: budget, progress, loss, rate"), "mute")
    picture.arrow([(646, 266), (646, 296), (160, 296), (160, 268)])
    picture.text(390, 314, "Action", "bold", at="middle")
    lines(390, 262, ("a group grows or gives a rank; the rate", "doubles or halves; undo; nothing"), "mute")
    picture.arrow([(70, 266), (70, 346)])
    picture.text(20, 366, "Reward, at the end", "bold")
    told = "-100 log(held-out loss / that of a rule's run on the same task, seed and batches)"
    picture.text(170, 366, told, "mute")
    return picture.svg(386)


PICTURES: dict[str, Callable[[], str]] = {
    "step.svg": step,
    "choices.svg": choices,
    "control.svg": control,
    "rates.svg": wrong_rates,
    "parts.svg": split,
    "environment.svg": environment,
}
"""What each picture of docs/images is drawn by."""


def outdated() -> dict[Path, str]:
    """The pictures that stored rows would have otherwise, and how."""
    drawn = {FOLDER / name: draw() for name, draw in PICTURES.items()}
    return {path: svg for path, svg in drawn.items() if not path.is_file() or path.read_text(encoding="utf-8") != svg}


def benchmark(options: Options, console: Console) -> Figures:
    """Draw what is out of date."""
    if options.ask:
        write_text(STEP, json.dumps(ask(), indent=1) + "\n")
    found = outdated()
    for path, svg in found.items():
        write_text(path, svg)
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in found)
    console.print(f"Drawn: {names}." if names else "All pictures are up to date.", markup=False)
    return {"drawn": names}
