"""Which task and which columns a data set is for, and whether every row holds what they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..errors import DataError, UnknownNameError
from .task import Task

TEXT, LABEL = "text", "label"
"""The names of the columns unless others are given."""

CHATS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""Columns that hold conversations or instructions, in the order in which they are looked for."""

_TEXTS: dict[Task, tuple[str, ...]] = {"token-classification": ("tokens",), "seq2seq": ("input", "source", "prompt")}
_LABELS: dict[Task, tuple[str, ...]] = {
    "token-classification": ("tags", "ner_tags"),
    "seq2seq": ("target", "output", "completion"),
}


@dataclass(frozen=True)
class Columns:
    """What a data set is for.

    Attributes:
        task: what a model learns from it.
        text: the column with what the model reads; None if `chat` says it.
        label: the column with what it predicts; None for language modelling.
        chat: the columns of conversations or instructions, one of `CHATS`; None for other data.
    """

    task: Task
    text: str | None
    label: str | None
    chat: tuple[str, ...] | None = None


def find_columns(part: Dataset, task: Task | None, text: str, label: str, *, reads_chats: bool = True) -> Columns:
    """The task and the columns of a data set.

    Args:
        part: rows of it.
        task: the task; None if the columns decide.
        text: the name that was given for the column with the text; `TEXT` if none was.
        label: the same for the column with the class, the number, the tags or the target; or `LABEL`.
        reads_chats: whether the tokenizer has a chat template. Without one, a text beside a conversation is preferred.

    Raises:
        UnknownNameError: the data set lacks a column.
        DataError: the label column does not tell the task.
    """
    names = part.column_names
    task = task or _task_of(part, text, label)
    if task == "causal-lm":
        forms = CHATS if reads_chats or TEXT not in names else CHATS[2:]
        chat = next((columns for columns in forms if text == TEXT and set(columns) <= set(names)), None)
        return Columns(task, None if chat else _present("text", text, names, _TEXTS.get(task, ())), None, chat)
    return Columns(
        task,
        _present("text", text, names, _TEXTS.get(task, ())),
        _present("label", label, names, _LABELS.get(task, ())),
    )


def _present(kind: str, given: str, names: Sequence[str], others: Sequence[str]) -> str:
    """The given column, or where that is the default and missing, the first of the others that is there."""
    candidates = [given, *others] if given in (TEXT, LABEL) else [given]
    for name in candidates:
        if name in names:
            return name
    raise UnknownNameError.of(f"{kind} column", given, names, f"Set --{kind}-column.")


def _task_of(part: Dataset, text: str, label: str) -> Task:
    """The task that the columns tell."""
    names = set(part.column_names)
    if label in names and (text in names or label != LABEL):
        if is_list(part, label) and is_list(part, text):
            return "token-classification"
        if not is_list(part, label) and _dtype(part, label).startswith("float"):
            return _refuse_floats(part, label)
        return "classification"
    if text == TEXT and label == LABEL:
        if any(set(columns) <= names for columns in CHATS):
            return "causal-lm"
        for other, texts in _TEXTS.items():
            if TEXT not in names and names & {*texts} and names & {*_LABELS[other]}:
                return other
    return "classification" if label in names else "causal-lm"


def _refuse_floats(part: Dataset, label: str) -> Task:
    """Raise DataError: fractions may be classes or amounts. An empty cell is named first, since it makes them."""
    check_no_gaps(part, label)
    first = next(iter(part[label]), None)
    raise DataError(
        f"The column {label!r} holds fractions (row 1: {first}). To predict numbers, pass --task regression; to take "
        "each value for a class, pass --task classification."
    )


def is_list(part: Dataset, name: str) -> bool:
    """Whether a column is there and holds lists."""
    feature = part.features.get(name)
    return isinstance(feature, list) or hasattr(feature, "feature")


def _dtype(part: Dataset, name: str) -> str:
    return str(getattr(part.features[name], "dtype", ""))


def values_of(part: Dataset, name: str) -> list[Any]:
    """The values of a column, one for each row."""
    return list(part[name][:])


def check_no_gaps(part: Dataset, name: str, *, blanks: bool = True) -> None:
    """Raise DataError if a row lacks a value; `blanks` tells whether an empty text is a value."""
    gaps = [
        row
        for row, value in enumerate(values_of(part, name), 1)
        if value is None or (not blanks and isinstance(value, str) and not value.strip())
    ]
    if gaps:
        raise DataError(
            f"The column {name!r} holds no value in {len(gaps)} of {len(part)} rows, first in row {gaps[0]}. Remove "
            "these rows, or fill them."
        )


def check_rows(part: Dataset, name: str, flaw: Callable[[Any], str | None], advice: str) -> None:
    """Raise DataError at the first row in which a column holds something wrong.

    Args:
        part: rows.
        name: the column.
        flaw: what a value is instead of what it should be, for example "a number"; None for a right value.
        advice: a sentence on what to do.
    """
    for row, value in enumerate(values_of(part, name), 1):
        wrong = flaw(value)
        if wrong is not None:
            raise DataError(f"Row {row}, column {name!r}: {shorten(value)} is {wrong}. {advice}")


def shorten(value: Any) -> str:
    """A value for an error: at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def not_text(value: Any) -> str | None:
    """What a value is, if it is no text."""
    return None if isinstance(value, str) else f"{kind_of(value)}, not text"


def kind_of(value: Any) -> str:
    """What a value is, for an error."""
    words: dict[type, str] = {list: "a list", dict: "a record", bool: "true or false", str: "text", type(None): "empty"}
    words |= dict.fromkeys((int, float), "a number")
    return words.get(type(value), f"of type {type(value).__name__}")


def not_number(value: Any) -> str | None:
    """What a value is, if it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "no number"
    return None if math.isfinite(number) else "no finite number"
