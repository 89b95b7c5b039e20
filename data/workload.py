"""Data sets by packaged name, Hugging Face id or local path, tokenised for a model: what a Trainer trains on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from ..errors import ConfigError, DataError, UnknownNameError
from .models import load_tokenizer, not_found
from .packaged_data import DATASETS, load_packaged_dataset
from .task import Task

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True, eq=False)
class Workload:
    """What a fine-tune trains on.

    Attributes:
        task: classification or causal language modelling.
        tokenizer: the model's tokenizer.
        train: tokenised rows.
        held_out: tokenised rows that training never sees.
        collator: makes batches of them.
        labels: class names; empty for language modelling.
    """

    task: Task
    tokenizer: Any
    train: Dataset
    held_out: Dataset
    collator: Any
    labels: tuple[str, ...]


def load_splits(name: str) -> DatasetDict:
    """The splits of a data set: packaged, a local file or folder, or a Hugging Face id.

    Raises:
        UnknownNameError, AssetError: there is no such data set.
        DataError: a local file of a kind that cannot be read.
    """
    if name in DATASETS:
        return load_packaged_dataset(name)
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise DataError(f"Cannot read {path}: its suffix is not one of {', '.join(_READERS)}.")
            if path.stat().st_size == 0:
                raise DataError(f"The data file {path} is empty.")
            loaded = load_dataset(_READERS[path.suffix], data_files=str(path))
        elif path.is_dir() and (path / "dataset_dict.json").exists():
            loaded = DatasetDict.load_from_disk(os.fspath(path))
        else:
            loaded = load_dataset(os.fspath(path) if path.is_dir() else name)
    except DataError:
        raise
    except Exception as error:  # datasets lets through what its many readers raise
        raise not_found("data set", name, dict.fromkeys(DATASETS), error) from error
    return DatasetDict(loaded)


def _split(splits: DatasetDict, label: str, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows: a split with labels, or else a tenth of the training rows."""
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    for name in ("test", "validation", "valid", "dev"):
        held_out = splits.get(name)
        if held_out is None or held_out is train:
            continue
        if label not in held_out.column_names or set(held_out.unique(label)) != {-1}:  # a contest hides its labels
            return train, held_out
    if len(train) < 2:
        raise DataError(f"A data set needs at least 2 rows; got {len(train)}.")
    parts = train.train_test_split(test_size=max(1, len(train) // 10), seed=seed)
    return parts["train"], parts["test"]


def _column(parts: list[Dataset], name: str, what: str) -> str:
    """The name of a column, if all parts have it and no row lacks a value there."""
    for part in parts:
        if name not in part.column_names:
            raise UnknownNameError.of(f"{what} column", name, part.column_names, f"Set --{what}-column.")
        empty = sum(value is None for value in part[name])
        if empty:
            raise DataError(f"The column {name!r} holds no value in {empty} of {len(part)} rows. Remove these rows.")
    return name


def load_workload(
    model: str,
    data: str,
    *,
    task: Task | None = None,
    max_length: int = 64,
    text_column: str = "text",
    label_column: str = "label",
    train_rows: int | None = None,
    held_out_rows: int | None = None,
    seed: int = 0,
) -> Workload:
    """Load and tokenise a data set for a model.

    Args:
        model: name of the model, whose tokenizer is used.
        data: name of the data set, see `load_splits`.
        task: classification if the data set has the label column, else causal language modelling.
        max_length: tokens in a row; longer texts are cut, or split for language modelling.
        text_column: the column with the text.
        label_column: the column with the class.
        train_rows: use at most so many training rows, drawn at random.
        held_out_rows: use at most so many held-out rows, drawn at random.
        seed: of these draws, and of a split if the data set has only one.

    Raises:
        UnknownNameError, AssetError, DataError, ConfigError: something is missing, empty or contradictory.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is at least 2; got {max_length}.")
    tokenizer = load_tokenizer(model)
    train, held_out = _split(load_splits(data), label_column, seed)
    task = task or ("classification" if label_column in train.column_names else "causal-lm")
    parts = []
    for part, rows in ((train, train_rows), (held_out, held_out_rows)):
        if len(part) == 0:
            sizes = f"{len(train)} and {len(held_out)}"
            raise DataError(f"The data set {data!r} has no rows in one of its splits: {sizes}.")
        parts.append(part.shuffle(seed=seed).select(range(min(rows or len(part), len(part)))))
    if task == "causal-lm":
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        text = _column(parts, text_column, "text")
        encoded = [_blocks(part, tokenizer, text, max_length) for part in parts]
        return Workload(task, tokenizer, encoded[0], encoded[1], collator, ())
    encoded, labels = _classified(parts, tokenizer, text_column, label_column, max_length)
    collator = DataCollatorWithPadding(tokenizer)
    return Workload(task, tokenizer, encoded[0], encoded[1], collator, labels)


def _classified(
    parts: list[Dataset], tokenizer: Any, text_column: str, label_column: str, max_length: int
) -> tuple[list[Dataset], tuple[str, ...]]:
    """Tokenised rows with the number of their class, and the names of the classes."""
    text, label = _column(parts, text_column, "text"), _column(parts, label_column, "label")
    feature = parts[0].features[label]
    values = sorted({value for part in parts for value in part.unique(label)})
    names = tuple(getattr(feature, "names", None) or map(str, values))
    if len(names) < 2:
        raise DataError(f"The column {label!r} holds a single class, {names}: nothing to learn.")
    index = {value: value if hasattr(feature, "names") else i for i, value in enumerate(values)}

    def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        tokens = tokenizer(rows[text], truncation=True, max_length=max_length)
        return {**tokens, "labels": [index[value] for value in rows[label]]}

    encoded = [part.map(encode, batched=True, remove_columns=part.column_names) for part in parts]
    return encoded, names


def _blocks(part: Dataset, tokenizer: Any, text: str, length: int) -> Dataset:
    """The text as one stream of tokens, cut into rows of equal length."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        stream = [token for ids in tokenizer(rows[text])["input_ids"] for token in (*ids, *end)]
        starts = range(0, len(stream) - length + 1, length)
        return {"input_ids": [stream[start : start + length] for start in starts]}

    blocks = part.map(encode, batched=True, remove_columns=part.column_names)
    if len(blocks) == 0:
        raise DataError(f"The text is shorter than one row of {length} tokens. Lower --max-length.")
    return blocks
