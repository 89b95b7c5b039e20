"""Labelled text as bytes: classification tasks for the proxies."""

from __future__ import annotations

import hashlib
from functools import lru_cache

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
        name: "topics": Reuters R8, news by subject, the official split. "sentiment": Rotten Tomatoes, train and
            validation part of `load_packaged_dataset` (its test part stays unseen). "newsgroups": 20 Newsgroups, posts
            by the first part of their group's name, the official split.

    Returns:
        Training rows and held-out rows: new lists, in an order that mixes the classes. A text that is in both halves of
        an official split is only among the held-out rows.

    Raises:
        UnknownNameError, AssetError: no such text, or it is neither cached nor downloadable.
    """
    if name not in LABELS:
        raise UnknownNameError.of("labelled text", name, LABELS)
    train, held_out = _load(name)
    return list(train), list(held_out)


@lru_cache(maxsize=len(LABELS))
def _load(name: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    names = LABELS[name]

    def rows(classes: dict[str, int]) -> tuple[Row, ...]:
        encoded = ((text.encode(), number) for text, number in classes.items())
        return tuple(sorted(encoded, key=lambda row: hashlib.sha256(row[0]).digest()))

    if name == "sentiment":
        splits = read_splits("rotten-tomatoes")
        halves = [{row["text"]: row["label"] for row in splits[part]} for part in ("train", "validation")]
    else:  # R8's classes have no dots
        official = read_official_split("reuters-r8" if name == "topics" else "20newsgroups")
        halves = [{text: names.index(group.partition(".")[0]) for text, group in half.items()} for half in official]
    train, held_out = map(rows, halves)
    return train, held_out
