"""The texts that benchmarks fine-tune on: packaged ones and those of the running Python, tokenised for a model."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.data import workload as tokens
from rankpilot.data.assets import fetch_asset
from rankpilot.data.columns import encoded
from rankpilot.data.corpora import EVAL_SHARE, docstrings, load_corpus, scattered, standard_library, translations
from rankpilot.data.models import load_tokenizer
from rankpilot.data.packaged_data import read_official_split
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

LENGTH = 48
"""Tokens of a row."""

PACKAGED = "smollm2-135m-instruct"
"""The packaged model behind each name that begins with "smollm2"; all other models read bytes and have no tokenizer."""

PIECE = 2000
"""Characters of a corpus that are tokenised at once."""


@dataclass(frozen=True)
class TextTask:
    """One fine-tune of a causal language model.

    Attributes:
        model: SmolLM2, whole or cut, or a proxy base, which reads bytes.
        text: a name that `load_text` knows, or "docstrings".
        steps: optimizer steps.
        rows: rows of a batch, each of `LENGTH` tokens.
        held_out: rows on which the loss of a run is told are twice as many.
        train_rows: distinct training rows at most.
    """

    model: str
    text: str
    steps: int
    rows: int
    held_out: int = 192
    train_rows: int = 4000

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.held_out, self.train_rows) < 1:
            raise ConfigError(f"All sizes of a task are at least 1; got {asdict(self)}.")


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a task trains on, and what it is judged on.

    Attributes:
        train: tokenised rows.
        held_out: tokenised rows that no run trains on.
        collate: makes a batch of rows.
    """

    train: Dataset
    held_out: Dataset
    collate: Callable[[list[Any]], Any]


def reads_bytes(model: str) -> bool:
    """Whether a model reads bytes and has no tokenizer."""
    return not model.startswith("smollm2")


@lru_cache(maxsize=2)
def load_data(task: TextTask) -> TaskData:
    """The rows of a task, which are the same on each machine (docstrings and code: with each version of Python).

    Raises:
        UnknownNameError: no such text.
        AssetError: a package is neither cached nor downloadable.
    """
    sizes = (task.train_rows, 2 * task.held_out)
    if task.text == "docstrings":
        tokenizer = load_tokenizer(PACKAGED)
        train, held_out = (
            encoded(Dataset.from_list(rows[:size]), tokenizer, LENGTH)[1]
            for rows, size in zip(instructions(), sizes, strict=True)
        )
        return TaskData(train, held_out, DataCollatorForSeq2Seq(tokenizer))
    halves = load_text(task.text)
    if reads_bytes(task.model):
        train, held_out = map(_windows, halves, sizes)
        return TaskData(train, held_out, _collate_bytes)
    tokenizer = load_tokenizer(PACKAGED)
    encode = tokens.blocks(tokenizer, "text", LENGTH)
    train, held_out = (_blocks(half, size, encode) for half, size in zip(halves, sizes, strict=True))
    return TaskData(train, held_out, DataCollatorForLanguageModeling(tokenizer, mlm=False))


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
        text = _library_source(which)
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


def _library_source(package: str) -> str:
    """The source of one package of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in standard_library() if path.relative_to(root).parts[0] == package)
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)


def instructions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions what a function of the running Python does, with the start of its docstring; split 9 to 1."""
    root, answers = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in standard_library():
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name, text in docstrings(path.read_text(encoding="utf-8", errors="ignore")):
            if name:
                answers[f"What does {module}.{name} do in Python?"] = text.split("\n\n")[0]
    rows = [
        {"prompt": f"{question}\n", "completion": " ".join(answers[question].split())}
        for question in scattered(answers)
    ]
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


def _windows(data: Any, count: int) -> Dataset:
    """Windows of bytes, evenly spread over a text."""
    starts = np.linspace(0, len(data) - LENGTH, count).astype(np.int64)
    rows = data[starts[:, None] + np.arange(LENGTH)].astype(np.int64)
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


def _collate_bytes(rows: list[Any]) -> Any:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def _blocks(data: Any, count: int, encode: tokens.Encode) -> Dataset:
    """Rows of tokens, from pieces that are evenly spread over a text."""
    text = bytes(data).decode("utf-8", errors="ignore")
    starts = np.linspace(0, max(len(text) - PIECE, 0), max(count // 8, 16)).astype(np.int64)
    return Dataset.from_dict(encode({"text": [text[start : start + PIECE] for start in starts]})).select(range(count))
