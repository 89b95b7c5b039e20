"""Text for people: numbers with units, tables for a terminal, and short names of modules.

A module's short name is its layer number and the shortest unambiguous rest.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_LAYERED = re.compile(r"^(?P<prefix>.*?)\.?\b(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class ShortName:
    """A module's name in two parts: "layer 3", empty outside the numbered layers, and such as "intermediate.dense"."""

    layer: str
    kind: str

    def __str__(self) -> str:
        return f"{self.layer} {self.kind}".strip()


def short_names(modules: Sequence[str]) -> list[ShortName]:
    """Shorten full names such as "encoder.layer.3.attention.self.query"; different names stay different."""
    matches = [_LAYERED.match(name) for name in modules]
    rests = [match["rest"] if match else name for match, name in zip(matches, modules, strict=True)]
    different = list(dict.fromkeys(rests))
    ends = dict(zip(different, shortest_ends(different, [0] * len(different)), strict=True))
    pairs = zip(matches, rests, strict=True)
    names = [ShortName(f"layer {match['layer']}" if match else "", ends[rest]) for match, rest in pairs]
    if len(set(names)) == len(set(modules)):
        return names
    # Two stacks of layers, as in T5: include the name of the stack.
    return [
        ShortName(f"{match['prefix'].split('.')[0]} {name.layer}" if match else "", rest)
        for match, name, rest in zip(matches, names, rests, strict=True)
    ]


def branches_to(name: str) -> list[str]:
    """Names of a module's ancestors, outermost first, and its own: "a", "a.b" and "a.b.c" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def shortest_ends(names: Sequence[str], groups: Sequence[int]) -> list[str]:
    """Shortest dotted suffixes that distinguish the names of one group, in order; a leading number keeps its word.

    Equal names have equal suffixes, even in different groups. A duplicate name in a group is given in full.
    """
    parts = {name: name.split(".") for name in names}
    sizes = dict.fromkeys(names, 1)
    while True:
        ends = [".".join(parts[name][-sizes[name] :]) for name in names]
        counts = Counter(zip(groups, ends, strict=True))
        alike = {end for (_, end), count in counts.items() if count > 1}
        unclear = (name for name, end in zip(names, ends, strict=True) if end in alike or end.split(".")[0].isdigit())
        longer = {name for name in unclear if sizes[name] < len(parts[name])}
        if not longer:
            return ends
        for name in longer:
            sizes[name] += 1


def kinds_in_layers(modules: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Shortest dotted suffixes of names that distinguish the modules of one layer, in order.

    The part before the layer number is used only if the rest is the same for two modules of one layer.
    """
    ends = shortest_ends([re.sub(r"^.*?\b\d+\.(?=.)", "", name) for name in modules], layers)
    counts = Counter(zip(layers, ends, strict=True))
    return [name if counts[layer, end] > 1 else end for name, layer, end in zip(modules, layers, ends, strict=True)]


def module_kinds(names: Sequence[ShortName]) -> list[str]:
    """Return the kind of each module, equal across layers and experts: such as "mlp.up_proj"."""
    # Without the number of an expert: "experts.3.up_proj" -> "experts.up_proj".
    full = [re.sub(r"(^|\.)\d+(?=\.|$)", "", name.kind).lstrip(".") or name.kind for name in names]
    different = list(dict.fromkeys(full))
    ends = dict(zip(different, shortest_ends(different, [0] * len(different)), strict=True))
    return [ends[kind] for kind in full]


def layer_titles(layers: Sequence[str]) -> list[str]:
    """Display names of layers: "layer 3", or the last part; in full to avoid duplicates."""
    numbers = [re.fullmatch(r"(?:.*\.)?(\d+)", name) for name in layers]
    pairs = zip(numbers, layers, strict=True)
    titles = [f"layer {number[1]}" if number else name.rpartition(".")[2] for number, name in pairs]
    return [title if titles.count(title) == 1 else name for title, name in zip(titles, layers, strict=True)]


def make_table(
    title: str, columns: Iterable[str], rows: Iterable[Sequence[str]] = (), *, first_wraps: bool = False
) -> Table:
    """Build a table: the first column left-aligned, figures right-aligned; no title if it is empty."""
    from rich.table import Table  # a run needs names and units from here, but no terminal

    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not (index or first_wraps))
    for row in rows:
        table.add_row(*row)
    return table


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float, *, up: bool = False) -> str:
    """Format a byte count in binary units: 1536 -> '1.5 KiB'; rounded to four digits, upwards if `up`."""
    unit, size = byte_unit(count)
    count /= size
    if up and count > 0:
        last_digit = 10.0 ** (0 if unit == "B" else math.floor(math.log10(count)) - 3)
        count = math.ceil(count / last_digit) * last_digit
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"


def given_bytes(count: float) -> str:
    """Format a user's byte count, with decimal units if it is round in these: 10**6 -> '1 MB (976.6 KiB)'."""
    binary, (_, size) = format_bytes(count), byte_unit(count)
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            decimal = f"{count / 10**power:.4g}"
            both = float(decimal) * 10**power == count != float(f"{count / size:.4g}") * size
            return f"{decimal} {unit} ({binary})" if both else binary
    return binary


def byte_unit(count: float) -> tuple[str, int]:
    """Usual binary unit for a byte count, and its bytes: 3000 -> ('KiB', 1024)."""
    power = sum(abs(count) >= 1024**step for step in range(1, len(_UNITS)))
    return _UNITS[power], 1024**power


def cost_text(cost: float, unit: str) -> str:
    """Format a cost with its unit: "96.5 MiB", "120,000 parameters"."""
    return format_bytes(cost) if unit == "bytes" else f"{cost:,.0f} parameters"


def plural(count: int, word: str) -> str:
    """Format a count with its noun: "1 run", "2 runs"."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def three_digits(value: float) -> str:
    """Format a number with three digits, or with all digits before the decimal point: 0.123, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def part_of(count: float, limit: float, unit: str) -> str:
    """Format a cost and its limit, with the unit once: '12.1 of 12.3 GiB', '240,000 of 300,000 parameters'."""
    if unit != "bytes":
        return f"{count:,.0f} of {limit:,.0f} {unit}"
    name, size = byte_unit(limit)
    return f"{three_digits(count / size)} of {three_digits(limit / size)} {name}"
