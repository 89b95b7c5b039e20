"""The splits of a data set, packaged, local or of the hub, and which rows training never sees."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from ..errors import AssetError, DataError, first_line
from .models import not_found
from .packaged_data import DATASETS, load_packaged_dataset

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_splits(name: str) -> DatasetDict:
    """The splits of a data set: packaged, a local file or folder, or a Hugging Face id.

    Raises:
        UnknownNameError, AssetError: there is no such data set.
        DataError: a local file that is empty or broken, or of a kind that cannot be read.
    """
    if name in DATASETS:
        return load_packaged_dataset(name)
    path = Path(name).expanduser()
    is_local = path.exists() or name.startswith((".", "/", "~")) or path.suffix in _READERS
    if is_local and not path.exists():
        raise AssetError(f"There is no data file or folder {path}.")
    if path.is_file():
        if path.suffix not in _READERS:
            raise DataError(f"Cannot read {path}: its suffix is not one of {', '.join(_READERS)}.")
        if path.stat().st_size == 0:
            raise DataError(f"The data file {path} is empty.")
    try:
        if path.is_file():
            loaded = load_dataset(_READERS[path.suffix], data_files=str(path))
        elif path.is_dir() and (path / "dataset_dict.json").exists():
            loaded = DatasetDict.load_from_disk(os.fspath(path))
        else:
            loaded = load_dataset(os.fspath(path) if path.is_dir() else name)
    except Exception as error:  # datasets lets through what its many readers raise
        if is_local:
            reason = (_broken_line(path) if path.suffix == ".jsonl" else "") or _root(error)
            raise DataError(f"The data {path} cannot be read: {reason}") from error
        raise not_found("data set", name, dict.fromkeys(DATASETS), error) from error
    return DatasetDict(loaded)


def _broken_line(path: Path) -> str:
    """Which line of a JSONL file is no JSON, counted from 1; "" if all are. Arrow counts rows from 0."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except ValueError as error:
                if line.strip():
                    return f"line {number} is no JSON: {first_line(error)}"
    return ""


def _root(error: BaseException) -> str:
    """The first line of the error that a reader raised: datasets wraps it in general ones."""
    causes = list(_chain(error))
    # A reader that fails may try another way, which fails too: the first one that names a place is the most telling.
    placed = [cause for cause in causes if any(word in str(cause) for word in ("line", "row", "column"))]
    telling = (placed or causes)[-1]
    return first_line(telling) if isinstance(telling, Exception) else str(telling)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all those from which it came."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def training_split(splits: DatasetDict) -> Dataset:
    """The split to train on."""
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def held_out_split(splits: DatasetDict, train: Dataset, label: str | None) -> Dataset | None:
    """The split that training never sees; None if there is none with labels.

    Args:
        splits: of the data set.
        train: the split to train on.
        label: the column with labels, if there is one.
    """
    for name in ("test", "validation", "valid", "dev"):
        part = splits.get(name)
        if part is not None and part is not train and not _hides_labels(part, label):
            return part
    return None


def halves(part: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and a tenth of the rows that are held out; DataError if there are too few."""
    if len(part) < 2:
        raise DataError(f"A data set needs at least 2 rows; got {len(part)}.")
    parts = part.train_test_split(test_size=max(1, len(part) // 10), seed=seed)
    return parts["train"], parts["test"]


def _hides_labels(part: Dataset, label: str | None) -> bool:
    """Whether every label is -1: contests keep those of the test split secret."""
    if label not in part.column_names or "int" not in str(getattr(part.features[label], "dtype", "")):
        return False
    return set(part.unique(label)) == {-1}
