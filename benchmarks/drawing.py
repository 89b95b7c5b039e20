"""Small charts as SVG: readable on light and dark ground, without a library, the same bytes on every machine.

Each picture paints its own ground, which follows the reader's colour scheme. Sizes are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

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

    def arrow(self, points: Sequence[tuple[float, float]]) -> None:
        """A line that ends in a head, which points the way of its last piece."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        ahead, aside = (
            ((x - x0) / length * 9, (y - y0) / length * 9),
            ((y0 - y) / length * 4.5, (x - x0) / length * 4.5),
        )
        back = x - ahead[0], y - ahead[1]
        corners = (x, y), (back[0] + aside[0], back[1] + aside[1]), (back[0] - aside[0], back[1] - aside[1])
        self.line([*points[:-1], back], "arrow")
        path = " ".join(f"{number(each[0])},{number(each[1])}" for each in corners)
        self.parts.append(f'<polygon points="{path}" class="head"/>')

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
class Interval:
    """A figure with the range around it.

    Attributes:
        name: words to its left; empty for a heading.
        value: the figure, in per cent.
        low: the lower end.
        high: the upper end.
        kind: its colour.
    """

    name: str
    value: float
    low: float
    high: float
    kind: str = "a"


def intervals(picture: Picture, groups: Sequence[tuple[str, Sequence[Interval]]], *, ends: tuple[float, float]) -> str:
    """Dots with ranges, in groups; what lies beyond the ends is cut there."""
    left, right, top = 330, WIDTH - 90, 74
    scale = (right - left) / (ends[1] - ends[0])

    def place(value: float) -> float:
        return left + scale * (min(max(value, ends[0]), ends[1]) - ends[0])

    y = top
    marks: list[tuple[float, Interval]] = []
    for heading, rows in groups:
        picture.text(20, y + 12, heading, "bold")
        y += 22
        for row in rows:
            marks.append((y, row))
            y += 22
        y += 8
    for value in range(math.ceil(ends[0] / 5) * 5, int(ends[1]) + 1, 5):
        picture.line([(place(value), top - 4), (place(value), y)], "axis" if value == 0 else "line")
        picture.text(place(value), y + 16, f"{value:+d}" if value else "0", "mute", at="middle")
    for at, row in marks:
        picture.text(left - 14, at + 10, row.name, at="end")
        picture.line([(place(row.low), at + 6), (place(row.high), at + 6)], f"curve {row.kind}-line")
        picture.dot(place(row.value), at + 6, row.kind)
        picture.text(WIDTH - 20, at + 10, f"{row.value:+.1f} %", at="end")
    return picture.svg(y + 32)


def grouped(
    picture: Picture, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], legend: Sequence[tuple[str, str]]
) -> str:
    """Groups of upright bars with their figures above them; each group has kinds and figures in per cent."""
    left, right, top, height = 30, WIDTH - 20, 84, 190
    most = max(value for _, rows in groups for _, value in rows)
    wide = (right - left) / len(groups)
    picture.line([(left, top + height), (right, top + height)], "axis")
    for index, (name, rows) in enumerate(groups):
        bar = (wide - 50) / len(rows)
        x = left + wide * index + 25
        for kind, value in rows:
            tall = height * value / most
            picture.box(x + 3, top + height - tall, bar - 6, max(tall, 1), kind)
            picture.text(x + bar / 2, top + height - tall - 6, f"{value:.1f}", "mute", at="middle")
            x += bar
        picture.text(left + wide * (index + 0.5), top + height + 20, name, at="middle")
    picture.legend(top + height + 52, legend)
    return picture.svg(top + height + 68)


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
