"""Data sets for a model, by packaged name, Hugging Face id or local path, as rows for a Trainer."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from ..common.errors import AssetError, DataError, first_line
from ..common.files import expanded, parse_json
from ..cost.forecast.published import try_hub_once
from ..cost.step_config import StepConfig
from . import columns
from .assets import not_found
from .models import load_tokenizer, with_sizes
from .packaged_data import DATASETS, load_packaged_dataset
from .task import ELSE, Task

Rows = Mapping[str, list[Any]]
Encode = Callable[[Rows], dict[str, Any]]


def class_names(parts: list[Dataset], label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names in a column, and the class index of each value.

    Raises:
        DataError: a row has no class or a list of them, values are of several kinds, or all have the same class.
    """
    for part in parts:
        if isinstance(feature := part.features[label], list) or hasattr(feature, "feature"):
            lists = f"Column {label!r} contains lists (row 1: {columns.shorten(part[0][label])})"
            raise DataError(f"{lists}, but classification needs one class per text. {ELSE}")
        columns.check_no_gaps(part, label, blanks=False)
    values = chain.from_iterable(columns.values_of(part, label) for part in parts)
    return _numbered(parts[0].features[label], values, label)


def _numbered(feature: Any, values: Iterable[Any], label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names and indices of the values; a class feature has its own names, and indices for values."""
    distinct = set(values)
    kinds = sorted({"numbers" if isinstance(value, (int, float)) else "text" for value in distinct})
    if len(kinds) > 1:
        examples = columns.shorten(sorted(map(str, distinct)))
        raise DataError(f"Column {label!r} contains both numbers and text: {examples}. Write all of them as text.")
    declared = getattr(feature, "names", None)
    ordered = range(len(declared)) if declared else sorted(distinct)
    names = tuple(declared or map(str, ordered))
    if len(names) < 2:
        raise DataError(f"Column {label!r} contains a single class, {names}: nothing to learn.")
    unknown = distinct - set(ordered)
    if unknown:
        raise DataError(f"Column {label!r} contains {min(unknown)!r}, but its classes are 0 to {len(names) - 1}.")
    return names, {value: number for number, value in enumerate(ordered)}


def check_text(parts: list[Dataset], name: str, option: str) -> None:
    """Raise DataError if a row holds no text; `option` sets the column."""
    for part in parts:
        columns.check_no_gaps(part, name)
        columns.check_rows(part, name, columns.not_text, f"Set {option} to a text column, or write its values as text.")
        if not any(value.strip() for value in part[name]):
            told = f"Column {name!r} is blank in all {len(part)} rows, so there is nothing to learn."
            raise DataError(f"{told} Set {option} to another column, or fill this one.")


def labelled(tokenizer: Any, text: str, label: str, numbers: Mapping[Any, int], length: int) -> Encode:
    """Tokenize texts, each with its class index."""

    def encode(rows: Rows) -> dict[str, Any]:
        tokens = tokenizer(rows[text], truncation=True, max_length=length)
        return {**tokens, "labels": [numbers[value] for value in rows[label]]}

    return encode


def blocks(tokenizer: Any, text: str, length: int) -> Encode:
    """Tokenize texts as one stream, split into rows of equal length."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode(rows: Rows) -> dict[str, Any]:
        stream = [token for ids in tokenizer(rows[text])["input_ids"] for token in (*ids, *end)]
        starts = range(0, len(stream) - length + 1, length)
        rows_of_tokens = [stream[start : start + length] for start in starts]
        return {"input_ids": rows_of_tokens, "labels": rows_of_tokens}  # even if the end token is the padding token

    return encode


_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_splits(name: str) -> DatasetDict:
    """Load the splits of a data set: packaged, a local file or folder, or a Hugging Face id.

    Raises:
        UnknownNameError, AssetError: there is no such data set.
        DataError: a local file is empty, broken, or in an unsupported format.
    """
    if name in DATASETS:
        return load_packaged_dataset(name)
    path = expanded(name)
    is_local = path.exists() or name.startswith((".", "/", "~")) or path.suffix in _READERS
    if is_local and not path.exists():
        raise AssetError(f"Data file or folder {path} does not exist.")
    if path.is_file():
        if path.suffix not in _READERS:
            raise DataError(f"Cannot read {path}: its suffix must be one of {', '.join(_READERS)}.")
        if path.stat().st_size == 0:
            raise DataError(f"The data file {path} is empty.")
    try:
        if path.is_file():
            loaded = load_dataset(_READERS[path.suffix], data_files=str(path))
        elif path.is_dir() and (path / "dataset_dict.json").exists():
            loaded = DatasetDict.load_from_disk(os.fspath(path))
        elif path.is_dir():
            loaded = load_dataset(os.fspath(path))
        else:
            try_hub_once()
            loaded = load_dataset(name)
    except Exception as error:  # datasets passes on the errors of its many readers
        if is_local:
            reason = (_broken_line(path) if path.suffix == ".jsonl" else "") or _root(error)
            raise DataError(f"Cannot read the data {path}: {reason}") from error
        raise not_found("data set", name, dict.fromkeys(DATASETS), error) from error
    return DatasetDict(loaded)


def _broken_line(path: Path) -> str:
    """Locate the first line of a JSONL file with invalid JSON, from 1; "" if there is none. Arrow counts from 0."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                if line.strip():
                    return f"line {number} is not JSON: {first_line(error)}"
    return ""


def _root(error: BaseException) -> str:
    """First line of a reader's root error: datasets wraps it in general ones."""
    causes = list(_chain(error))
    # A failing reader may try another way and fail again: the first error with a location is the most informative.
    placed = [cause for cause in causes if any(word in str(cause) for word in ("line", "row", "column"))]
    telling = (placed or causes)[-1]
    return first_line(telling) if isinstance(telling, Exception) else str(telling)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def held_out_split(splits: DatasetDict, train: Dataset, label: str | None) -> Dataset | None:
    """Return the held-out split; None if there is none with labels.

    Args:
        splits: splits of the data set.
        train: the split to train on.
        label: the column with labels, if there is one.
    """
    for name in ("test", "validation", "valid", "dev"):
        part = splits.get(name)
        if part is not None and part is not train and not _hides_labels(part, label):
            return part
    return None


def halves(part: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a tenth of the rows as held-out; DataError if there are too few."""
    if len(part) < 2:
        raise DataError(f"A data set needs at least 2 rows; got {len(part)}.")
    parts = part.train_test_split(test_size=max(1, len(part) // 10), seed=seed)
    return parts["train"], parts["test"]


def _hides_labels(part: Dataset, label: str | None) -> bool:
    """True if no row has a label, or each has -1: contests hide the labels of the test split."""
    if label is None or label not in part.column_names:
        return label is not None
    if not hasattr(part.features[label], "dtype"):  # lists
        return False
    values = set(part.unique(label))
    return bool(values) and values <= {-1, None}


@dataclass(frozen=True, eq=False)
class Workload:
    """Data of a fine-tune.

    Attributes:
        task: the task to learn.
        tokenizer: the model's tokenizer.
        train: training rows, tokenized but for conversations, which TRL's SFTTrainer reads itself.
        held_out: held-out rows, likewise.
        collator: collates rows to batches; None for conversations.
        labels: names of the classes; empty for language models.
    """

    task: Task
    tokenizer: Any
    train: Dataset
    held_out: Dataset
    collator: Any
    labels: tuple[str, ...]


def load_workload(
    model: str,
    data: str,
    *,
    task: Task | None = None,
    max_length: int = 0,
    text_column: str = columns.TEXT,
    label_column: str = columns.LABEL,
    train_rows: int | None = None,
    held_out_rows: int | None = None,
    seed: int = 0,
) -> Workload:
    """Load and tokenize a data set for a model.

    Args:
        model: name of the model; determines the tokenizer.
        data: name of the data set, see `load_splits`.
        task: the task to learn; by default inferred from the columns, see `find_columns`.
        max_length: tokens per row; longer texts are truncated, or split for language modeling; 0 for the task's
            default.
        text_column: the column with the text.
        label_column: the column with the class.
        train_rows: maximum number of training rows, drawn at random.
        held_out_rows: maximum number of held-out rows, drawn at random.
        seed: seed of these draws, and of a split if the data set has only one.

    Raises:
        UnknownNameError, AssetError, DataError, ConfigError: something is missing, empty or contradictory.
    """
    tokenizer = load_tokenizer(model)
    splits = load_splits(data)
    source = splits["train"] if "train" in splits else next(iter(splits.values()))
    reads_chats = bool(getattr(tokenizer, "chat_template", None))
    found = columns.find_columns(source, task, text_column, label_column, reads_chats=reads_chats)
    held_out = held_out_split(splits, source, found.label)
    sources = [source] if held_out is None else [source, held_out]
    if 0 in map(len, sources):
        raise DataError(
            f"The data set {data!r} has an empty split: {' and '.join(str(len(part)) for part in sources)}."
        )
    whole = halves(source, seed) if held_out is None else (source, held_out)
    counted = zip(whole, (train_rows, held_out_rows), strict=True)
    parts = [part.shuffle(seed=seed).select(range(min(rows or len(part), len(part)))) for part, rows in counted]
    length = with_sizes(StepConfig(max_length=max_length), model, found.task).max_length
    return _of_columns(found, tokenizer, sources, parts, length)


def _of_columns(
    found: columns.Columns, tokenizer: Any, sources: list[Dataset], parts: list[Dataset], length: int
) -> Workload:
    """Check all rows of the sources, under their numbers there, and tokenize the parts drawn from them."""
    if found.chat:
        for part, name in product(sources, found.chat):
            if name not in columns.BESIDE_CHATS:
                columns.check_no_gaps(part, name)
        train, rows = (part.select_columns(list(found.chat)) for part in parts)
        return Workload(found.task, tokenizer, train, rows, None, ())
    assert found.text is not None
    check_text(sources, found.text, "--text-column")
    labels: tuple[str, ...] = ()
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    if found.label is None:
        encode = blocks(tokenizer, found.text, length)
    else:
        labels, numbers = class_names(sources, found.label)
        encode = labelled(tokenizer, found.text, found.label, numbers, length)
        collator = DataCollatorWithPadding(tokenizer)
        columns.tell_cut(tokenizer(parts[0][found.text][: columns.SAMPLED], verbose=False)["input_ids"], length)
    train, rows = (part.map(encode, batched=True, remove_columns=part.column_names) for part in parts)
    if 0 in (len(train), len(rows)):
        raise DataError(f"The text is shorter than one row of {length} tokens. Lower --max-length.")
    return Workload(found.task, tokenizer, train, rows, collator, labels)
