"""Labelled text as bytes: classification tasks for the proxies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial

from ..errors import UnknownNameError
from .packaged_data import R8, SENTIMENT, read_official_split, read_splits

Row = tuple[bytes, int]
"""A text in UTF-8 and the index of its class in `LABELS`."""

LABELS: dict[str, tuple[str, ...]] = {
    "topics": R8,
    "sentiment": SENTIMENT,
    "newsgroups": ("alt", "comp", "misc", "rec", "sci", "soc", "talk"),
}
"""Names of the classes of each labelled text."""


def load_labelled(name: str) -> tuple[list[Row], list[Row]]:
    """A text classification task with a fixed split; no text occurs twice.

    Args:
        name: one of `LABELS`. "topics": Reuters R8, news by subject, the official split. "sentiment": Rotten
            Tomatoes, train and validation part of `load_packaged_dataset` (its test part stays unseen).
            "newsgroups": 20 Newsgroups, posts by the first part of their group's name, the official split.

    Returns:
        Training rows and held-out rows: new lists, in an order that mixes the classes. A text that is in both halves of
        an official split is only among the held-out rows.

    Raises:
        UnknownNameError: no such labelled text.
        AssetError: it is neither cached nor downloadable.
    """
    if name not in LABELS:
        raise UnknownNameError.of("labelled text", name, LABELS)
    train, held_out = _load(name)
    return list(train), list(held_out)


@lru_cache(maxsize=len(LABELS))
def _load(name: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    train, held_out = _READERS[name]()
    names = LABELS[name]

    def rows(labels: dict[str, str]) -> tuple[Row, ...]:
        encoded = ((text.encode(), names.index(label)) for text, label in labels.items())
        return tuple(sorted(encoded, key=lambda row: hashlib.sha256(row[0]).digest()))

    return rows(train), rows(held_out)


_Halves = tuple[dict[str, str], dict[str, str]]
"""{text: class} of the training rows, and of the held-out rows."""


def _newsgroups() -> _Halves:
    train, held_out = read_official_split("20newsgroups")
    return _top_level(train), _top_level(held_out)


def _top_level(groups: dict[str, str]) -> dict[str, str]:
    return {text: group.partition(".")[0] for text, group in groups.items()}


def _sentiment() -> _Halves:
    splits, names = read_splits("rotten-tomatoes"), LABELS["sentiment"]
    train, held_out = ({row["text"]: names[row["label"]] for row in splits[part]} for part in ("train", "validation"))
    return train, held_out


_READERS: dict[str, Callable[[], _Halves]] = {
    "topics": partial(read_official_split, "reuters-r8"),
    "sentiment": _sentiment,
    "newsgroups": _newsgroups,
}
