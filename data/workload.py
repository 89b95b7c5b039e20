"""Data sets for a model, by packaged name, Hugging Face id or local path, as rows for a Trainer."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict, load_dataset

from ..common.errors import AssetError, ConfigError, DataError, first_line
from ..common.files import expanded, parse_json
from ..cost.forecast.published import try_hub_once
from ..cost.step_config import StepConfig
from . import columns
from .assets import not_found
from .batches import IGNORED
from .models import class_end_token, load_tokenizer, with_sizes
from .packaged_data import DATASETS, load_packaged_dataset
from .task import Task

Rows = Mapping[str, list[Any]]
Encode = Callable[[Rows], dict[str, Any]]


def class_names(parts: list[Dataset], label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names in a column, and the class index of each value.

    Raises:
        DataError: a row has no class or a list of them, values are of several kinds, or all have the same class.
    """
    for part in parts:
        if columns.is_list(part, label):
            lists = f"Column {label!r} contains lists (row 1: {columns.shorten(part[0][label])})"
            tags = "For a tag per token, pass --task token-classification, with the tokens as a list too."
            several = "Several classes per text (multi-label) are not supported."
            raise DataError(f"{lists}, but classification needs one class per text. {tags} {several}")
        columns.check_no_gaps(part, label, blanks=False)
    values = chain.from_iterable(columns.values_of(part, label) for part in parts)
    return _numbered(parts[0].features[label], values, label)


def tag_names(parts: list[Dataset], text: str, label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Tag names in a column of lists, and the tag index of each value.

    Raises:
        DataError: a row holds no lists, or lists of different lengths.
    """
    for part in parts:
        for name in (text, label):
            columns.check_no_gaps(part, name)
            advice = "Token classification requires a list of tokens and a list of tags in each row."
            columns.check_rows(part, name, columns.not_list, advice)
        pairs = zip(columns.values_of(part, text), columns.values_of(part, label), strict=True)
        for row, (words, tags) in enumerate(pairs, 1):
            if len(words) != len(tags):
                told = f"Row {row} has {len(words)} values in column {text!r} and {len(tags)} in {label!r}."
                raise DataError(f"{told} Each token needs one tag.")
            for name, values, wrong in ((text, words, columns.not_text), (label, tags, _not_tag)):
                bad = next((value for value in values if wrong(value) is not None), None)
                if bad is not None or None in values:
                    raise DataError(f"Row {row}, column {name!r}: {columns.shorten(bad)} is {wrong(bad)}.")
    lists = chain.from_iterable(columns.values_of(part, label) for part in parts)
    tags = (tag for tag in chain.from_iterable(lists) if tag != IGNORED)
    return _numbered(getattr(parts[0].features[label], "feature", None), tags, label)


def _not_tag(value: Any) -> str | None:
    """Describe a value if it is not a tag."""
    return None if isinstance(value, (int, str)) else columns.kind_of(value)


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
        columns.check_filled(part, name, f"Set {option} to another column, or fill this one.")


def check_numbers(parts: list[Dataset], name: str) -> None:
    """Raise DataError if a row holds no finite number."""
    for part in parts:
        columns.check_no_gaps(part, name, blanks=False)
        columns.check_rows(part, name, columns.not_number, "Regression requires a finite number in each row.")
    if len({float(value) for part in parts for value in part[name]}) == 1:
        raise DataError(f"Column {name!r} has the same number in each row: nothing to learn.")


def labelled(
    tokenizer: Any, text: str, label: str, number: Callable[[Any], Any], length: int, end: int | None
) -> Encode:
    """Tokenize texts, each with its class index or number.

    `end` is a token required exactly once, at the end of each row; None if the model needs none.
    """

    def encode(rows: Rows) -> dict[str, Any]:
        tokens = dict(tokenizer(rows[text], truncation=True, max_length=length))
        if end is not None:
            texts = [[token for token in row if token != end] for row in tokens["input_ids"]]
            ids = [[*row[: length - 1], end] for row in texts]
            tokens = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        return {**tokens, "labels": [number(value) for value in rows[label]]}

    return encode


def tagged(tokenizer: Any, text: str, label: str, numbers: Mapping[Any, int], length: int) -> Encode:
    """Tokenize lists of tokens; the first piece of each gets its tag index, others get `IGNORED`.

    Raises:
        ConfigError: the tokenizer does not map pieces to tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        needs = "a fast tokenizer (tokenizer.json), which this model does not have"
        raise ConfigError(f"Token classification requires {needs}.")

    def encode(rows: Rows) -> dict[str, Any]:
        tokens = tokenizer(rows[text], is_split_into_words=True, truncation=True, max_length=length)
        labels = []
        for row, tags in enumerate(rows[label]):
            words = tokens.word_ids(row)
            starts = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            pieces = zip(words, starts, strict=True)
            labels.append([numbers.get(tags[word], IGNORED) if start else IGNORED for word, start in pieces])
        return {**tokens, "labels": labels}

    return encode


def translated(tokenizer: Any, text: str, label: str, length: int) -> Encode:
    """Tokenize texts and their targets; each target ends in the end token, if the tokenizer has one."""
    end = tokenizer.eos_token_id

    def encode(rows: Rows) -> dict[str, Any]:
        tokens = tokenizer(rows[text], truncation=True, max_length=length)
        targets = tokenizer(text_target=rows[label], truncation=True, max_length=length)["input_ids"]
        if end is not None:
            targets = [[*row[: length - 1], end] if row[-1:] != [end] else row for row in targets]
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": targets}

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
class Texts:
    """Untokenized data for a language model, in the columns of TRL's SFTTrainer.

    Attributes:
        train: rows with the column `text`, or `messages`, or the columns `prompt` and `completion`.
        held_out: held-out rows.
        is_chat: True for conversations or instructions. Other texts may be joined and split anywhere.
    """

    train: Dataset
    held_out: Dataset
    is_chat: bool


@dataclass(frozen=True, eq=False)
class Workload:
    """Data of a fine-tune.

    Attributes:
        task: the task to learn.
        tokenizer: the model's tokenizer.
        train: tokenized training rows.
        held_out: tokenized held-out rows.
        collator: collates rows to batches.
        labels: names of the classes or tags; "value" for regression; empty for generative models.
        texts: the same rows for SFTTrainer; None unless the task is causal-lm.
    """

    task: Task
    tokenizer: Any
    train: Dataset
    held_out: Dataset
    collator: Any
    labels: tuple[str, ...]
    texts: Texts | None = None


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
        text_column: the column with the text, or with the tokens.
        label_column: the column with the class, the number, the tags or the target text.
        train_rows: maximum number of training rows, drawn at random.
        held_out_rows: maximum number of held-out rows, drawn at random.
        seed: seed of these draws, and of a split if the data set has only one.

    Raises:
        UnknownNameError, AssetError, DataError, ConfigError: something is missing, empty or contradictory.
    """
    step = StepConfig(max_length=max_length)
    tokenizer = load_tokenizer(model)
    splits = load_splits(data)
    source = splits["train"] if "train" in splits else next(iter(splits.values()))
    reads_chats = bool(getattr(tokenizer, "chat_template", None))
    found = columns.find_columns(source, task, text_column, label_column, reads_chats=reads_chats)
    held_out = held_out_split(splits, source, found.label)
    sources = [source] if held_out is None else [source, held_out]
    if any(len(part) == 0 for part in sources):
        sizes = " and ".join(str(len(part)) for part in sources)
        raise DataError(f"The data set {data!r} has an empty split: {sizes}.")
    whole = halves(source, seed) if held_out is None else (source, held_out)
    counted = zip(whole, (train_rows, held_out_rows), strict=True)
    parts = [part.shuffle(seed=seed).select(range(min(rows or len(part), len(part)))) for part, rows in counted]
    length = with_sizes(step, model, found.task).max_length
    return _LOADERS[found.task](_Reading(model, tokenizer, found, length, sources, parts))


@dataclass(frozen=True, eq=False)
class _Reading:
    """A data set being converted to a workload.

    Attributes:
        model: name of the model.
        tokenizer: the model's tokenizer.
        found: task and columns of the data set.
        length: maximum tokens per row.
        sources: whole splits; every row is checked under its number there.
        parts: the training rows and the held-out rows among them.
    """

    model: str
    tokenizer: Any
    found: columns.Columns
    length: int
    sources: list[Dataset]
    parts: list[Dataset]

    @property
    def text(self) -> str:
        """Column with the model's input."""
        assert self.found.text is not None
        return self.found.text

    @property
    def label(self) -> str:
        """Column with the target."""
        assert self.found.label is not None
        return self.found.label

    def workload(
        self, encode: Encode, collator: Any, labels: tuple[str, ...] = (), cut: tuple[str, ...] = ()
    ) -> Workload:
        """Build the workload, tokenized by `encode`, which truncates the columns `cut`."""
        sample = self.parts[0][: columns.SAMPLED]
        for name in cut:
            words = isinstance(sample[name][0], list)
            tokens = self.tokenizer(sample[name], is_split_into_words=words, verbose=False)["input_ids"]
            columns.tell_cut(map(len, tokens), self.length)
        train, held_out = (part.map(encode, batched=True, remove_columns=part.column_names) for part in self.parts)
        return Workload(self.found.task, self.tokenizer, train, held_out, collator, labels)


def _classes(reading: _Reading) -> Workload:
    check_text(reading.sources, reading.text, "--text-column")
    names, numbers = class_names(reading.sources, reading.label)
    collator = transformers.DataCollatorWithPadding(reading.tokenizer)
    return reading.workload(_labelled(reading, numbers.__getitem__), collator, names, cut=(reading.text,))


def _numbers(reading: _Reading) -> Workload:
    check_text(reading.sources, reading.text, "--text-column")
    check_numbers(reading.sources, reading.label)
    collator = transformers.DataCollatorWithPadding(reading.tokenizer)
    return reading.workload(_labelled(reading, float), collator, ("value",), cut=(reading.text,))


def _labelled(reading: _Reading, number: Callable[[Any], Any]) -> Encode:
    end = class_end_token(reading.model)
    return labelled(reading.tokenizer, reading.text, reading.label, number, reading.length, end)


def _tags(reading: _Reading) -> Workload:
    names, numbers = tag_names(reading.sources, reading.text, reading.label)
    if getattr(reading.tokenizer, "add_prefix_space", None) is False:
        # Byte-level tokenizers expect words with a leading space, absent from tokens in a list.
        reading = replace(reading, tokenizer=load_tokenizer(reading.model, add_prefix_space=True))
    encode = tagged(reading.tokenizer, reading.text, reading.label, numbers, reading.length)
    collator = transformers.DataCollatorForTokenClassification(reading.tokenizer)
    return reading.workload(encode, collator, names, cut=(reading.text,))


def _pairs(reading: _Reading) -> Workload:
    check_text(reading.sources, reading.text, "--text-column")
    check_text(reading.sources, reading.label, "--label-column")
    encode = translated(reading.tokenizer, reading.text, reading.label, reading.length)
    collator = transformers.DataCollatorForSeq2Seq(reading.tokenizer)
    return reading.workload(encode, collator, cut=(reading.text, reading.label))


def _language(reading: _Reading) -> Workload:
    tokenizer, length, chat, text = reading.tokenizer, reading.length, reading.found.chat, reading.found.text
    if chat:
        for part in reading.sources:
            columns.check_chats(part, chat, tokenizer)
        rows = [columns.for_trl(part, chat, tokenizer) for part in reading.parts]
        sample = rows[0].select(range(min(columns.SAMPLED, len(rows[0]))))
        columns.tell_cut((len(columns.chat_tokens(row, tokenizer)[0]) for row in sample), length)
        (train, train_tokens), (held_out, held_out_tokens) = (columns.encoded(part, tokenizer, length) for part in rows)
        collator = transformers.DataCollatorForSeq2Seq(tokenizer)
        texts = Texts(train, held_out, is_chat=True)
        return Workload("causal-lm", tokenizer, train_tokens, held_out_tokens, collator, (), texts)
    check_text(reading.sources, reading.text, "--text-column")
    workload = reading.workload(blocks(tokenizer, reading.text, length), transformers.DataCollatorForSeq2Seq(tokenizer))
    if 0 in (len(workload.train), len(workload.held_out)):
        raise DataError(f"The text is shorter than one row of {length} tokens. Lower --max-length.")
    plain = [part.select_columns([text]) for part in reading.parts]
    train, held_out = (part if text == columns.TEXT else part.rename_column(text, columns.TEXT) for part in plain)
    return replace(workload, texts=Texts(train, held_out, is_chat=False))


_LOADERS: dict[Task, Callable[[_Reading], Workload]] = {
    "classification": _classes,
    "regression": _numbers,
    "token-classification": _tags,
    "seq2seq": _pairs,
    "causal-lm": _language,
}
