"""`python -m benchmarks pictures`: the pictures of the documentation, drawn again from stored rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rankpilot.common.arrays import FloatArray, IntArray
from rankpilot.common.files import read_object, write_text
from rankpilot.cost.streaming import PartSeconds
from rankpilot.decide.plan.parts import plan_parts
from rich.console import Console

from . import rates
from .harness import Figures, padding_share
from .pages import ROOT

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


# Charts as SVG: readable on light and dark ground, the same bytes on every machine -----------------------------------

WIDTH = 760

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #24292f }
.ground { fill: #ffffff; stroke: #d0d7de }
.title { font-size: 15px; font-weight: 600 }
.mute { fill: #59636e }
.bold { font-weight: 600 }
.line { stroke: #d0d7de; fill: none }
.axis { stroke: #59636e; fill: none }
.arrow { stroke: #59636e; fill: none; stroke-width: 1.6 }
.head { fill: #59636e }
.limit { stroke: #cf222e; stroke-width: 2; fill: none }
.limit-text { fill: #cf222e }
.box { fill: #f6f8fa; stroke: #59636e }
.a { fill: #0969da } .a-line { stroke: #0969da }
.b { fill: #bf8700 } .b-line { stroke: #bf8700 }
.c { fill: #1a7f37 } .c-line { stroke: #1a7f37 }
.d { fill: #8c959f } .d-line { stroke: #8c959f }
.e { fill: #8250df } .e-line { stroke: #8250df }
.pale { fill: #d0d7de }
.curve { fill: none; stroke-width: 2.4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .ground { fill: #0d1117; stroke: #30363d }
  .mute, .head { fill: #9198a1 }
  .line { stroke: #30363d }
  .axis, .arrow { stroke: #9198a1 }
  .limit { stroke: #ff7b72 } .limit-text { fill: #ff7b72 }
  .box { fill: #161b22; stroke: #9198a1 }
  .a { fill: #58a6ff } .a-line { stroke: #58a6ff }
  .b { fill: #d29922 } .b-line { stroke: #d29922 }
  .c { fill: #3fb950 } .c-line { stroke: #3fb950 }
  .d { fill: #6e7681 } .d-line { stroke: #6e7681 }
  .e { fill: #bc8cff } .e-line { stroke: #bc8cff }
  .pale { fill: #30363d }
}
"""


def number(value: float) -> str:
    """A coordinate with one digit after the point at most."""
    return f"{round(value, 1):g}"


@dataclass
class Picture:
    """A picture that is being drawn.

    Attributes:
        title: what it shows, its first line.
        told: what a reader needs to know to read it, its second line.
        parts: its elements so far.
    """

    title: str
    told: str = ""
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "", *, at: str = "start") -> None:
        """Words whose base line begins, ends or has its middle at a point: `at` is "start", "end" or "middle"."""
        kinds = f' class="{kind}"' if kind else ""
        anchor = "" if at == "start" else f' text-anchor="{at}"'
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{kinds}{anchor}>{escape(words, quote=False)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *, round: float = 2) -> None:
        """A rectangle."""
        size = f'width="{number(max(width, 0))}" height="{number(height)}" rx="{number(round)}"'
        self.parts.append(f'<rect x="{number(x)}" y="{number(y)}" {size} class="{kind}"/>')

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str, size: float = 4.5) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(size)}" class="{kind}"/>')

    def legend(self, y: float, names: Sequence[tuple[str, str]], x: float = 20) -> None:
        """Names of kinds beside squares of their colour, in a row."""
        for kind, words in names:
            self.box(x, y - 10, 12, 12, kind)
            self.text(x + 18, y, words, "mute")
            x += 18 + 7.4 * len(words) + 16

    def svg(self, height: float) -> str:
        """The file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(height)}" role="img"'
        described = f"<title>{escape(self.title)}</title>"
        self_told = [f'<text x="20" y="28" class="title">{escape(self.title, quote=False)}</text>']
        if self.told:
            self_told.append(f'<text x="20" y="48" class="mute">{escape(self.told, quote=False)}</text>')
        ground = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{number(height - 1)}" rx="8" class="ground"/>'
        body = "\n".join((f"<style>{STYLE}</style>", described, ground, *self_told, *self.parts))
        return f'{head} width="{WIDTH}">\n{body}\n</svg>\n'


@dataclass(frozen=True)
class Stack:
    """A bar of pieces that lie one after another.

    Attributes:
        name: words to its left.
        pieces: kinds and lengths.
        told: columns of words to its right.
    """

    name: str
    pieces: tuple[tuple[str, float], ...]
    told: tuple[str, ...]


def stacks(
    picture: Picture,
    rows: Sequence[Stack],
    *,
    heads: Sequence[str],
    legend: Sequence[tuple[str, str]],
    limit: tuple[float, str],
    left: float = 262,
) -> str:
    """Horizontal bars of pieces with a limit across all of them."""
    right = WIDTH - 30 - 84 * len(heads)
    most = max(sum(length for _, length in row.pieces) for row in rows)
    scale, top = (right - left) / most, 96
    for column, head in enumerate(heads):
        picture.text(right + 84 * (column + 1), top - 12, head, "mute", at="end")
    for index, row in enumerate(rows):
        y, x = top + 34 * index, left
        picture.text(left - 10, y + 16, row.name, at="end")
        for kind, length in row.pieces:
            picture.box(x, y, scale * length - 1, 24, kind)
            x += scale * length
        for column, words in enumerate(row.told):
            picture.text(right + 84 * (column + 1), y + 16, words, at="end")
    bottom = top + 34 * len(rows)
    at = left + scale * limit[0]
    picture.line([(at, top - 8), (at, bottom)], "limit")
    picture.text(at, top - 12, limit[1], "limit-text", at="middle")
    _scale_below(picture, left, scale, most, bottom)
    picture.legend(bottom + 56, legend)
    return picture.svg(bottom + 72)


def _scale_below(picture: Picture, left: float, scale: float, most: float, y: float) -> None:
    """An axis of round numbers below bars that begin at 0."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200) if most / step <= 8)
    picture.line([(left, y), (left + scale * most, y)], "axis")
    for value in range(0, int(most) + 1, step):
        picture.text(left + scale * value, y + 18, f"{value}", "mute", at="middle")


@dataclass(frozen=True)
class Curve:
    """A line of points.

    Attributes:
        name: what it is.
        kind: its colour.
        points: where it goes through.
    """

    name: str
    kind: str
    points: tuple[tuple[float, float], ...]


def curves(
    picture: Picture, rows: Sequence[Curve], *, ticks: Sequence[tuple[float, str]], most: float, below: str
) -> str:
    """Lines over a scale with named ticks; what is higher than `most` is left out."""
    left, right, top, height = 62, WIDTH - 56, 74, 220
    low, high = ticks[0][0], ticks[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - low) / (high - low), top + height * (1 - y / most)

    for value in range(0, int(most) + 1, 5):
        picture.line([place(low, value), place(high, value)], "axis" if value == 0 else "line")
        picture.text(left - 8, place(low, value)[1] + 4, f"+{value} %" if value else "0", "mute", at="end")
    for x, words in ticks:
        picture.text(place(x, 0)[0], top + height + 20, words, "mute", at="middle")
    for row in rows:
        picture.line([place(x, y) for x, y in row.points if y <= most], f"curve {row.kind}-line")
        for x, y in row.points:
            if y <= most:
                picture.dot(*place(x, y), row.kind, 3.5)
    picture.text((left + right) / 2, top + height + 42, below, "mute", at="middle")
    picture.legend(top + height + 70, [(row.kind, row.name) for row in rows])
    return picture.svg(top + height + 86)


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
    return stacks(
        picture,
        rows,
        heads=("on the card", "time"),
        legend=legend,
        limit=(limit, f"{limit:.1f} GiB"),
        left=280,
    )


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
    return curves(
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


PICTURES: dict[str, Callable[[], str]] = {
    "step.svg": step,
    "rates.svg": wrong_rates,
    "parts.svg": split,
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
