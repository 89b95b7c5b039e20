"""Module names as people read them: the layer's number and the shortest clear rest."""

from __future__ import annotations

import re
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
    """The shortest dotted end of each kind that no other kind ends with; a leading number gets its word."""
    different = set(kinds)
    found: dict[str, str] = {}
    for kind in different:
        parts = kind.split(".")
        for size in range(1, len(parts) + 1):
            end = ".".join(parts[-size:])
            alone = not any(other != kind and f".{other}".endswith(f".{end}") for other in different)
            if size == len(parts) or (alone and not parts[-size].isdigit()):
                found[kind] = end
                break
    return [found[kind] for kind in kinds]


def layer_titles(layers: Sequence[str]) -> list[str]:
    """Layers as people name them, in order: "layer 3", or the last part of a name; in full where two would be alike.

    Args:
        layers: full names such as "bert.encoder.layer.3" or "bert.embeddings".
    """
    found = [re.fullmatch(r"(?:.*\.)?(\d+)", name) for name in layers]
    titles = [
        f"layer {match[1]}" if match else name.rpartition(".")[2] for match, name in zip(found, layers, strict=True)
    ]
    return [title if titles.count(title) == 1 else name for title, name in zip(titles, layers, strict=True)]
