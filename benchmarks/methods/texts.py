"""The data of the methods benchmark: packaged texts and those of the running Python, tokenised for a task's model."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rankpilot.data import workload as tokens
from rankpilot.data.assets import fetch_asset
from rankpilot.data.columns import encoded
from rankpilot.data.corpora import EVAL_SHARE, docstrings, load_corpus, scattered, standard_library, translations
from rankpilot.data.models import load_tokenizer
from rankpilot.data.packaged_data import DATASETS, read_official_split, read_splits
from rankpilot.errors import UnknownNameError
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding

from .tasks import MethodTask

PACKAGED = {
    "minilm-l6": "all-minilm-l6-v2",
    "minilm-l3": "all-minilm-l6-v2",
    "smollm2-135m": "smollm2-135m-instruct",
    "smollm2-15": "smollm2-135m-instruct",
    "smollm2-8": "smollm2-135m-instruct",
}
"""The packaged model behind each name."""


def reads_bytes(model: str) -> bool:
    """Whether a model reads bytes and has no tokenizer."""
    return model not in PACKAGED


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model that has one."""
    return load_tokenizer(PACKAGED[model])


Label = int | float | str
Pairs = Sequence[tuple[str, Label]]
"""Texts with a class, a number or an answer."""

PIECE = 2000
"""Characters of a corpus that are tokenised at once."""

LIBRARIES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
"""Packages of the standard library whose source is told apart."""

MOST_PIECES = 1500
"""Pieces of each text that is told apart from others, at most."""


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a task trains on, and what it is judged on.

    Attributes:
        train: tokenised rows.
        tuning: held-out rows on which rates and plans are chosen.
        held_out: held-out rows of results; none of them is in `tuning`.
        collate: makes a batch of rows.
        labels: names of classes; "value" for a number; none for texts.
    """

    train: Dataset
    tuning: Dataset
    held_out: Dataset
    collate: Callable[[list[Any]], Any]
    labels: tuple[str, ...]


@lru_cache(maxsize=2)
def load_data(task: MethodTask) -> TaskData:
    """The rows of a task, which are the same on each machine (docstrings and code: with each version of Python).

    Raises:
        UnknownNameError: no such data for this kind of task.
        AssetError: a package is neither cached nor downloadable.
    """
    if task.kind == "causal-lm":
        train, held_out, collate = _causal(task)
        labels: tuple[str, ...] = ()
    else:
        labels, texts = _labelled(task.data)
        tokenizer, number = tokenizer_of(task.model), (float if task.kind == "regression" else int)
        encode = tokens.labelled(tokenizer, "text", "label", number, task.length, None)
        sizes = (task.train_rows, 2 * task.held_out)
        train, held_out = (_encoded(part[:size], encode) for part, size in zip(texts, sizes, strict=True))
        collate = DataCollatorWithPadding(tokenizer)
    half = len(held_out) // 2
    return TaskData(train, held_out.select(range(half)), held_out.select(range(half, 2 * half)), collate, labels)


def _encoded(pairs: Pairs, encode: tokens.Encode) -> Dataset:
    return Dataset.from_dict(encode({"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}))


# Texts with a class or a number ---------------------------------------------------------------------------------------


def _labelled(name: str) -> tuple[tuple[str, ...], tuple[Pairs, Pairs]]:
    """Names of the classes, and the rows of the training part and of the held-out part, each text once and mixed."""
    if name in DATASETS:
        splits = read_splits(name)
        parts = {part: {row["text"]: row["label"] for row in splits[part]} for part in ("train", "test")}
        return DATASETS[name], _mixed(parts["train"], parts["test"])
    if name not in _LABELLED:
        raise UnknownNameError.of("labelled data set", name, [*DATASETS, *_LABELLED])
    return _LABELLED[name]()


def _mixed(train: Mapping[str, Label], held_out: Mapping[str, Label]) -> tuple[Pairs, Pairs]:
    first, second = ([(text, part[text]) for text in scattered(part)] for part in (train, held_out))
    return first, second


def _groups(keep: Callable[[str], bool], level: int) -> tuple[tuple[str, ...], tuple[Pairs, Pairs]]:
    """Posts to some newsgroups, by the first `level` parts of the group's name."""
    halves = [
        {text: ".".join(group.split(".")[:level]) for text, group in half.items() if keep(group)}
        for half in read_official_split("20newsgroups")
    ]
    names = tuple(sorted({name for half in halves for name in half.values()}))
    train, held_out = ({text: names.index(name) for text, name in half.items()} for half in halves)
    return names, _mixed(train, held_out)


def _lengths(name: str) -> tuple[tuple[str, ...], tuple[Pairs, Pairs]]:
    """How long a text is, from its beginning: the log of its words, in standard deviations from the mean."""
    splits = read_splits(name)
    parts = [{row["text"]: math.log(len(row["text"].split())) for row in splits[part]} for part in ("train", "test")]
    mean, deviation = np.mean(list(parts[0].values())), np.std(list(parts[0].values()))
    train, held_out = ({text: float((log - mean) / deviation) for text, log in part.items()} for part in parts)
    return ("value",), _mixed(train, held_out)


def _libraries() -> tuple[tuple[str, ...], tuple[Pairs, Pairs]]:
    """Pieces of Python's source, by the package that they belong to."""
    return _pieces({name: library_source(name) for name in LIBRARIES}, 100)


def _origins() -> tuple[tuple[str, ...], tuple[Pairs, Pairs]]:
    """A few words each, by the text that they come from."""
    names = ("german", "spanish", "tales", "reviews", "code", "tables")
    texts = {name: bytes(load_corpus(name)[0]).decode("utf-8", errors="ignore") for name in names}
    return _pieces(texts, 16)


def _pieces(texts: Mapping[str, str], length: int) -> tuple[tuple[str, ...], tuple[Pairs, Pairs]]:
    """Pieces of some texts, by the text's name, split 9 to 1."""
    found: dict[str, Label] = {}
    for number, text in enumerate(texts.values()):
        starts = np.linspace(0, len(text) - length, MOST_PIECES).astype(np.int64)
        found |= {text[start : start + length]: number for start in starts}
    mixed = scattered(found)
    cut = len(mixed) * 9 // 10
    train, held_out = ({text: found[text] for text in part} for part in (mixed[:cut], mixed[cut:]))
    return tuple(texts), _mixed(train, held_out)


_LABELLED: dict[str, Callable[[], tuple[tuple[str, ...], tuple[Pairs, Pairs]]]] = {
    "newsgroups": lambda: _groups(lambda group: not group.startswith("comp."), 1),
    "computers": lambda: _groups(lambda group: group.startswith("comp."), 3),
    "news-length": lambda: _lengths("reuters-r8"),
    "review-length": lambda: _lengths("imdb"),
    "libraries": _libraries,
    "origins": _origins,
}
"""Data sets made of packaged ones; "newsgroups" and "computers" share no post."""


@lru_cache(maxsize=1)
def documented_names() -> tuple[tuple[str, str], ...]:
    """Functions and classes of the standard library, such as "asyncio.base_events.run_forever", with their docstrings.

    They come from the running Python, and differ a little from one of its versions to the next. In file order.
    """
    root, pairs = Path(sysconfig.get_paths()["stdlib"]), []
    for path in standard_library():
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        source = path.read_text(encoding="utf-8", errors="ignore")
        pairs += [(f"{module}.{name}", text) for name, text in docstrings(source) if name]
    return tuple(pairs)


def library_source(package: str) -> str:
    """The source of one package of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in standard_library() if path.relative_to(root).parts[0] == package)
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)


# Texts alone ----------------------------------------------------------------------------------------------------------


def load_text(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bytes of a text, uint8: its first nine tenths, and the rest, held out.

    Args:
        name: of `CORPORA`; or "language-fi" (a language of the asset "plone-locales"), "package-email" (source of the
            standard library) or "group-sci.med" (posts to a newsgroup).

    Raises:
        UnknownNameError: no such text.
        AssetError: a package is neither cached nor downloadable.
    """
    kind, _, which = name.partition("-")
    if kind == "language":
        text = translations(which, fetch_asset("plone-locales"))
    elif kind == "package":
        text = library_source(which)
    elif kind == "group":
        posts = (post for post, group in read_official_split("20newsgroups")[0].items() if group == which)
        text = "\n\n".join(scattered(posts))
    else:
        return load_corpus(name)
    if not text:
        raise UnknownNameError(f"There is no text {name!r}: its package has none of that name.")
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    cut = int(len(data) * (1 - EVAL_SHARE))
    return data[:cut], data[cut:]


def _causal(task: MethodTask) -> tuple[Dataset, Dataset, Callable[[list[Any]], Any]]:
    if task.data == "docstrings":
        tokenizer = tokenizer_of(task.model)
        train, held_out = _instructions()
        parts = (
            encoded(Dataset.from_list(rows[:size]), tokenizer, task.length)[1]
            for rows, size in ((train, task.train_rows), (held_out, 2 * task.held_out))
        )
        return *parts, DataCollatorForSeq2Seq(tokenizer)
    halves = load_text(task.data)
    sizes = (task.train_rows, 2 * task.held_out)
    if reads_bytes(task.model):
        parts = (_windows(half, size, task.length) for half, size in zip(halves, sizes, strict=True))
        return *parts, _collate_bytes
    tokenizer = tokenizer_of(task.model)
    encode = tokens.blocks(tokenizer, "text", task.length)
    parts = (_blocks(half, size, encode) for half, size in zip(halves, sizes, strict=True))
    return *parts, DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _instructions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions what a function of the standard library does, with the start of its docstring; split 9 to 1."""
    answers = {f"What does {name} do in Python?": text.split("\n\n")[0] for name, text in documented_names()}
    rows = [
        {"prompt": f"{question}\n", "completion": " ".join(answers[question].split())}
        for question in scattered(answers)
    ]
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


def _windows(data: Any, count: int, length: int) -> Dataset:
    """Windows of bytes, evenly spread over a text."""
    starts = np.linspace(0, len(data) - length, count).astype(np.int64)
    rows = data[starts[:, None] + np.arange(length)].astype(np.int64)
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


def _collate_bytes(rows: list[Any]) -> Any:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def _blocks(data: Any, count: int, encode: tokens.Encode) -> Dataset:
    """Rows of tokens, from pieces that are evenly spread over a text."""
    text = bytes(data).decode("utf-8", errors="ignore")
    starts = np.linspace(0, max(len(text) - PIECE, 0), max(count // 8, 16)).astype(np.int64)
    return Dataset.from_dict(encode({"text": [text[start : start + PIECE] for start in starts]})).select(range(count))
