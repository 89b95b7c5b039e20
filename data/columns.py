"""The task and the columns of a data set, with a check of every row.

| columns | task |
|---|---|
| a text and a class | classification |
| `messages`, `conversations`, or `prompt` and `completion` | language modeling, as TRL's SFTTrainer reads them |
| a text | language modeling |

Conversations keep the columns `tools` and `chat_template_kwargs`.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..common.errors import DataError, UnknownNameError
from .task import ELSE, Task

TEXT, LABEL = "text", "label"
"""Default column names."""

CHATS = (("messages",), ("conversations",), ("prompt", "completion"))
"""Columns of conversations, or of prompts with their completions, in order of preference."""

BESIDE_CHATS = ("tools", "chat_template_kwargs")
"""Columns of TRL's SFTTrainer that go with conversations."""


@dataclass(frozen=True)
class Columns:
    """Task and columns of a data set.

    Attributes:
        task: the task to learn.
        text: column with the model's input; None if `chat` is given.
        label: column with the class; None for language modeling.
        chat: columns for TRL's SFTTrainer; None for other data.
    """

    task: Task
    text: str | None
    label: str | None
    chat: tuple[str, ...] | None = None


def find_columns(part: Dataset, task: Task | None, text: str, label: str, *, reads_chats: bool = True) -> Columns:
    """Find the task and the columns of a data set.

    Args:
        part: some of its rows.
        task: the task; None to infer it from the columns: classification if there is a column `label`.
        text: given name of the text column; `TEXT` if none was given.
        label: given name of the column with the class; `LABEL` if none was given.
        reads_chats: True if the tokenizer has a chat template. Otherwise, a text column is preferred over a
            conversation.

    Raises:
        UnknownNameError: the data set lacks a column.
        DataError: the label column holds fractions, which may be amounts.
    """
    names = part.column_names
    if task is None:
        chats = text == TEXT and TEXT not in names and any(set(columns) <= {*names} for columns in CHATS)
        task = "classification" if label in names and not chats else "causal-lm"
        if task == "classification" and str(getattr(part.features[label], "dtype", "")).startswith("float"):
            check_no_gaps(part, label)  # a common cause of fractions
            told = f"Column {label!r} contains fractions (row 1: {next(iter(part[label]), None)})."
            raise DataError(f"{told} To treat each value as a class, pass --task classification. {ELSE}")
    if task == "causal-lm":
        forms = CHATS if reads_chats or TEXT not in names else ()
        chat = next((columns for columns in forms if text == TEXT and set(columns) <= set(names)), None)
        if chat:
            return Columns(task, None, None, (*chat, *(name for name in BESIDE_CHATS if name in names)))
        return Columns(task, _present("text", text, names), None)
    return Columns(task, _present("text", text, names), _present("label", label, names))


def _present(kind: str, given: str, names: Sequence[str]) -> str:
    if given not in names:
        raise UnknownNameError.of(f"{kind} column", given, names, f"Set --{kind}-column. {ELSE}")
    return given


def values_of(part: Dataset, name: str) -> list[Any]:
    """Values of a column, one per row."""
    return list(part[name][:])


def check_no_gaps(part: Dataset, name: str, *, blanks: bool = True) -> None:
    """Raise DataError if a row lacks a value; with `blanks`, an empty text counts as a value."""
    values = values_of(part, name)
    given = values if blanks else [value.strip() or None if isinstance(value, str) else value for value in values]
    gaps = [row for row, value in enumerate(given, 1) if value is None]
    if gaps:
        told = f"Column {name!r} has no value in {len(gaps)} of {len(part)} rows, first in row {gaps[0]}."
        raise DataError(f"{told} Remove these rows, or fill them.")


def check_rows(part: Dataset, name: str, flaw: Callable[[Any], str | None], advice: str) -> None:
    """Raise DataError at the first row with an invalid value in a column.

    Args:
        part: the rows.
        name: the column.
        flaw: describes an invalid value, for example "a number"; returns None for a valid one.
        advice: a sentence on the fix.
    """
    for row, value in enumerate(values_of(part, name), 1):
        wrong = flaw(value)
        if wrong is not None:
            raise DataError(f"Row {row}, column {name!r}: {shorten(value)} is {wrong}. {advice}")


def shorten(value: Any) -> str:
    """Shorten a value for an error: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def not_text(value: Any) -> str | None:
    """Describe a value if it is not a text."""
    return None if isinstance(value, str) else f"{kind_of(value)}, not text"


def not_list(value: Any) -> str | None:
    """Describe a value if it is not a list."""
    return None if isinstance(value, list) else kind_of(value)


def kind_of(value: Any) -> str:
    """Describe a value for an error."""
    words: dict[type, str] = {list: "a list", dict: "a record", bool: "true or false", str: "text", type(None): "empty"}
    words |= dict.fromkeys((int, float), "a number")
    return words.get(type(value), f"of type {type(value).__name__}")


logger = logging.getLogger(__name__)

SAMPLED = 1000
"""Maximum rows tokenized to estimate the truncated share."""

MUCH_CUT = 0.05
"""Truncated share of tokens above which a message is logged."""


def tell_cut(rows: Iterable[Sequence[int]], length: int) -> None:
    """Log a message if a maximum length truncates much of some rows.

    Args:
        rows: tokens of each row before truncation.
        length: maximum tokens per row.
    """
    tokens = [len(row) for row in rows]
    cut = sum(max(count - length, 0) for count in tokens) / max(sum(tokens), 1)
    if cut > MUCH_CUT:
        told = "%.0f %% of the tokens are truncated: rows have at most %d, and the longest text has %d."
        told += " --max-length %d keeps all, but takes more memory."
        logger.warning(told, 100 * cut, length, max(tokens), max(tokens))
