"""Module names as people read them: the layer's number and the shortest clear rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LAYERED = re.compile(r"^(?P<prefix>.*?)\.?\b(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class ShortName:
    """A module's name in two parts.

    Attributes:
        layer: "layer 3"; empty for a module outside the numbered layers.
        kind: such as "query" or "intermediate.dense".
    """

    layer: str
    kind: str

    def __str__(self) -> str:
        return f"{self.layer} {self.kind}".strip()


def short_names(modules: Sequence[str]) -> list[ShortName]:
    """Shorten full module names, in order; different names stay different.

    Args:
        modules: full names such as "encoder.layer.3.attention.self.query".
    """
    matches = [_LAYERED.match(name) for name in modules]
    kinds = shortest_suffixes([match["rest"] if match else name for match, name in zip(matches, modules, strict=True)])
    names = [
        ShortName(f"layer {match['layer']}" if match else "", kind) for match, kind in zip(matches, kinds, strict=True)
    ]
    if len(set(names)) == len(set(modules)):
        return names
    # Two stacks of layers, as in T5: their names tell which one.
    return [
        ShortName(f"{match['prefix'].split('.')[0]} {name.layer}" if match else "", match["rest"] if match else full)
        for match, name, full in zip(matches, names, modules, strict=True)
    ]


def shortest_suffixes(kinds: Sequence[str]) -> list[str]:
    """The shortest dotted end of each kind that no other kind has; a leading number gets its word."""
    different = list(dict.fromkeys(kinds))
    ends = dict(zip(different, shortest_ends(different, [0] * len(different)), strict=True))
    return [ends[kind] for kind in kinds]


def shortest_ends(names: Sequence[str], groups: Sequence[int]) -> list[str]:
    """The shortest dotted ends that tell the names of one group apart, in order; a leading number gets its word.

    Equal names have equal ends, also in different groups. A name that a group holds twice is given in full.

    Args:
        names: such as "attention.self.query".
        groups: number of each name's group.
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

    Args:
        modules: full names, different from each other.
        layers: the layer of each module.
    """
    ends = shortest_ends([re.sub(r"^.*?\b\d+\.(?=.)", "", name) for name in modules], layers)
    counts = Counter(zip(layers, ends, strict=True))
    return [name if counts[layer, end] > 1 else end for name, layer, end in zip(modules, layers, ends, strict=True)]


def layer_titles(layers: Sequence[str]) -> list[str]:
    """Layers as people name them, in order: "layer 3", or the last part of a name; in full where two would be alike.

    Args:
        layers: full names such as "bert.encoder.layer.3" or "bert.embeddings".
    """
    numbers = [re.fullmatch(r"(?:.*\.)?(\d+)", name) for name in layers]
    titles = [
        f"layer {number[1]}" if number else name.rpartition(".")[2]
        for number, name in zip(numbers, layers, strict=True)
    ]
    return [title if titles.count(title) == 1 else name for title, name in zip(titles, layers, strict=True)]
