"""Module names as people read them: the layer's number and the shortest clear rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    kinds = [ends[rest] for rest in rests]
    names = [
        ShortName(f"layer {match['layer']}" if match else "", kind) for match, kind in zip(matches, kinds, strict=True)
    ]
    if len(set(names)) == len(set(modules)):
        return names
    # Two stacks of layers, as in T5: their names tell which one.
    return [
        ShortName(f"{match['prefix'].split('.')[0]} {name.layer}" if match else "", rest)
        for match, name, rest in zip(matches, names, rests, strict=True)
    ]


def branches_to(name: str) -> list[str]:
    """Names of the modules that hold a module, outermost first, and its own: "a", "a.b" and "a.b.c" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def shortest_ends(names: Sequence[str], groups: Sequence[int]) -> list[str]:
    """The shortest dotted ends that tell the names of one group apart, in order; a leading number gets its word.

    Equal names have equal ends, also in different groups. A name that a group holds twice is given in full.
    """
    parts = {name: name.split(".") for name in names}
    sizes = dict.fromkeys(names, 1)
    while True:
        ends = [".".join(parts[name][-sizes[name] :]) for name in names]
        counts = Counter(zip(groups, ends, strict=True))
        alike = {end for (_, end), count in counts.items() if count > 1}
        longer = {
            name
            for name, end in zip(names, ends, strict=True)
            if (end in alike or end.partition(".")[0].isdigit()) and sizes[name] < len(parts[name])
        }
        if not longer:
            return ends
        for name in longer:
            sizes[name] += 1


def kinds_in_layers(modules: Sequence[str], layers: Sequence[int]) -> list[str]:
    """The shortest dotted ends of names that tell the modules of one layer apart, in order.

    What stands before the layer's number counts only where the rest is the same for two modules of one layer.
    """
    ends = shortest_ends([re.sub(r"^.*?\b\d+\.(?=.)", "", name) for name in modules], layers)
    counts = Counter(zip(layers, ends, strict=True))
    return [name if counts[layer, end] > 1 else end for name, layer, end in zip(modules, layers, ends, strict=True)]


def layer_titles(layers: Sequence[str]) -> list[str]:
    """Full names of layers as people say them: "layer 3", or the last part; in full where two would be alike."""
    numbers = [re.fullmatch(r"(?:.*\.)?(\d+)", name) for name in layers]
    pairs = zip(numbers, layers, strict=True)
    titles = [f"layer {number[1]}" if number else name.rpartition(".")[2] for number, name in pairs]
    return [title if titles.count(title) == 1 else name for title, name in zip(titles, layers, strict=True)]
