"""Tokenised rows for each task, from columns that have been checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from datasets import Dataset

from ..errors import ConfigError, DataError
from .batches import IGNORED
from .columns import check_no_gaps, check_rows, is_list, kind_of, not_number, not_text, shorten, values_of

Rows = Mapping[str, list[Any]]
Encode = Callable[[Rows], dict[str, Any]]


def class_names(parts: list[Dataset], label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the classes in a column, and the number of each value.

    Raises:
        DataError: a row has no class or a list of them, values are of several kinds, or all have the same class.
    """
    for part in parts:
        if is_list(part, label):
            raise DataError(
                f"The column {label!r} holds lists (row 1: {shorten(part[0][label])}), and classification takes one "
                "class for a text. A tag for each token: pass --task token-classification, and the tokens as a list "
                "too. Several classes for one text (multi-label) cannot be trained."
            )
        check_no_gaps(part, label, blanks=False)
    return _numbered(parts[0].features[label], chain.from_iterable(values_of(part, label) for part in parts), label)


def tag_names(parts: list[Dataset], text: str, label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the tags in a column of lists, and the number of each value.

    Raises:
        DataError: a row holds no lists, or lists of different lengths.
    """
    for part in parts:
        for name in (text, label):
            check_no_gaps(part, name)
            advice = "Token classification needs a list of tokens and a list of tags in each row."
            check_rows(part, name, lambda value: None if isinstance(value, list) else kind_of(value), advice)
        for row, (words, tags) in enumerate(zip(values_of(part, text), values_of(part, label), strict=True), 1):
            if len(words) != len(tags):
                raise DataError(
                    f"Row {row} has {len(words)} values in the column {text!r} and {len(tags)} in {label!r}. Each "
                    "token needs one tag."
                )
            for name, values, wrong in ((text, words, not_text), (label, tags, _not_tag)):
                bad = next((value for value in values if wrong(value) is not None), None)
                if bad is not None or None in values:
                    raise DataError(f"Row {row}, column {name!r}: {shorten(bad)} is {wrong(bad)}.")
    lists = chain.from_iterable(values_of(part, label) for part in parts)
    return _numbered(getattr(parts[0].features[label], "feature", None), chain.from_iterable(lists), label)


def _not_tag(value: Any) -> str | None:
    """What a value is, if it is no tag."""
    return None if isinstance(value, (int, str)) else kind_of(value)


def _numbered(feature: Any, values: Iterable[Any], label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names and numbers of the values; a class feature has its own names, and numbers for values."""
    distinct = set(values) - {IGNORED}
    kinds = sorted({"numbers" if isinstance(value, (int, float)) else "text" for value in distinct})
    if len(kinds) > 1:
        examples = shorten(sorted(map(str, distinct)))
        raise DataError(f"The column {label!r} holds both numbers and text: {examples}. Write all of them as text.")
    declared = getattr(feature, "names", None)
    ordered = range(len(declared)) if declared else sorted(distinct)
    names = tuple(declared or map(str, ordered))
    if len(names) < 2:
        raise DataError(f"The column {label!r} holds a single class, {names}: nothing to learn.")
    unknown = distinct - set(ordered)
    if unknown:
        raise DataError(f"The column {label!r} holds {min(unknown)!r}, and its classes are 0 to {len(names) - 1}.")
    return names, {value: number for number, value in enumerate(ordered)}


def check_text(parts: list[Dataset], name: str, option: str) -> None:
    """Raise DataError if a row holds no text; `option` sets the column."""
    for part in parts:
        check_no_gaps(part, name)
        check_rows(part, name, not_text, f"Set {option} to a column of text, or write its values as text.")


def check_numbers(parts: list[Dataset], name: str) -> None:
    """Raise DataError if a row holds no finite number."""
    for part in parts:
        check_no_gaps(part, name, blanks=False)
        check_rows(part, name, not_number, "Regression needs a finite number in each row.")
    if len({float(value) for part in parts for value in part[name]}) == 1:
        raise DataError(f"The column {name!r} holds the same number in each row: nothing to learn.")


def labelled(
    tokenizer: Any, text: str, label: str, number: Callable[[Any], Any], length: int, end: int | None
) -> Encode:
    """Tokenises texts, each with the number of its class or its amount.

    `end` is the token that must be in each row exactly once, at its end; None if the model needs none.
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
    """Tokenises lists of tokens; the first piece of each has the number of its tag, others have `IGNORED`.

    Raises:
        ConfigError: the tokenizer does not tell which token a piece belongs to.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("Token classification needs a fast tokenizer (tokenizer.json), which this model has not.")

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
    """Tokenises texts and their targets; each target ends in the end token, if the tokenizer has one."""
    end = tokenizer.eos_token_id

    def encode(rows: Rows) -> dict[str, Any]:
        tokens = tokenizer(rows[text], truncation=True, max_length=length)
        targets = tokenizer(text_target=rows[label], truncation=True, max_length=length)["input_ids"]
        if end is not None:
            targets = [[*row[: length - 1], end] if row[-1:] != [end] else row for row in targets]
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": targets}

    return encode


def blocks(tokenizer: Any, text: str, length: int) -> Encode:
    """Tokenises texts as one stream, cut into rows of equal length."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode(rows: Rows) -> dict[str, Any]:
        stream = [token for ids in tokenizer(rows[text])["input_ids"] for token in (*ids, *end)]
        starts = range(0, len(stream) - length + 1, length)
        return {"input_ids": [stream[start : start + length] for start in starts]}

    return encode
