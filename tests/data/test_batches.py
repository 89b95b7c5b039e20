"""What share of the tokens of a batch the loss asks about, and which rows of a data set are the longest."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from rankpilot.common.errors import DataError
from rankpilot.data import batches

TOKENS = torch.ones(4, 10, dtype=torch.int64)
MASK = TOKENS.clone()
MASK[0, 6:] = 0
ANSWERS = torch.full((4, 10), batches.IGNORED)
ANSWERS[:, 7:] = 5
COUNTS: dict[str, tuple[Any, tuple[int, int]]] = {
    "a language model": ({"input_ids": TOKENS, "labels": TOKENS}, (40, 40)),
    "one with padding, which labels ignore": (
        {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS.where(MASK > 0, batches.IGNORED)},
        (36, 36),
    ),
    "answers alone": ({"input_ids": TOKENS, "attention_mask": MASK, "labels": ANSWERS}, (12, 36)),
    "a classifier": ({"input_ids": TOKENS, "attention_mask": MASK, "labels": torch.zeros(4).long()}, (4, 36)),
    "several labels a text": ({"input_ids": TOKENS, "labels": torch.zeros(4, 7)}, (4, 40)),
    "regression": ({"input_ids": TOKENS, "labels": torch.zeros(4)}, (4, 40)),
    "a short answer to a long text": ({"input_ids": TOKENS, "labels": torch.ones(4, 3).long()}, (12, 40)),
    "more answer than text": ({"input_ids": TOKENS[:, :2], "labels": torch.ones(4, 9).long()}, (36, 36)),
    "packed rows": ({"input_ids": TOKENS.view(1, 40), "labels": ANSWERS.view(1, 40)}, (12, 40)),
    "answers that are compared": ({"prompt_ids": TOKENS, "chosen_ids": TOKENS}, (40, 40)),
    "no mapping": ([TOKENS], (40, 40)),
}


@pytest.mark.parametrize(("batch", "counts"), COUNTS.values(), ids=COUNTS)
def test_counts(batch: Any, counts: tuple[int, int]) -> None:
    assert batches.count_predictions(batch) == counts


def test_the_share_of_several_batches() -> None:
    assert batches.predicted_share([(4, 40), (4, 10)]) == pytest.approx(8 / 50)
    assert batches.predicted_share([(0, 40)]) > 0, "its logarithm is taken"
    assert batches.predicted_share([(0, 0)]) == 1


class Rows(torch.utils.data.Dataset[Any]):
    """An ordinary data set of torch, without columns; notes which rows were read."""

    def __init__(self, lengths: list[int], make: Any = lambda ids: {"input_ids": ids, "labels": ids}) -> None:
        self.lengths, self.make, self.read = lengths, make, set[int]()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        self.read.add(index)
        return self.make(list(range(self.lengths[index])))


def padding(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)}


@pytest.mark.parametrize("kind", ["data set of torch", "list", "datasets", "transform"])
def test_the_longest_rows_are_found_in_any_data_set(kind: str) -> None:
    lengths = [3, 9, 4, 11, 5, 2]
    rows = Rows(lengths)
    dataset: Any = rows
    if kind != "data set of torch":
        dataset = [rows[index] for index in range(len(rows))]
    if kind == "datasets":
        dataset = Dataset.from_list(dataset)
    if kind == "transform":  # which makes the token ids when a row is read
        counts = Dataset.from_dict({"count": lengths})
        dataset = counts.with_transform(lambda some: {"input_ids": [list(range(count)) for count in some["count"]]})
    assert batches.largest_batch(dataset, padding, 2)["input_ids"].shape == (2, 11)


TEXTS: dict[str, tuple[dict[str, list[int]], list[tuple[str, ...]]]] = {
    "KTO": (
        {"prompt_ids": [9, 1, 2, 2, 8], "completion_ids": [1, 12, 4, 2, 3], "KL_completion_ids": [3, 1, 14, 4, 2]},
        [("prompt_ids", "completion_ids"), ("prompt_ids", "KL_completion_ids")],
    ),
    "ORPO": ({"prompt_input_ids": [9, 8, 1], "chosen_input_ids": [10, 10, 14]}, [("chosen_input_ids",)]),
    "encoder-decoder": ({"input_ids": [9, 8, 2, 7], "labels": [1, 2, 12, 3]}, [("input_ids",), ("labels",)]),
    "prompts alone": ({"prompt_ids": [3, 9, 4]}, [("prompt_ids",)]),
}
"""Lengths of the columns of some data sets, and the columns of which each tensor of a batch is made."""


@pytest.mark.parametrize("kind", ["datasets", "list"])
@pytest.mark.parametrize(("columns", "texts"), TEXTS.values(), ids=TEXTS)
def test_no_batch_has_a_longer_text_than_the_largest(columns, texts, kind):
    def widths(rows: list[Any]) -> dict[str, torch.Tensor]:
        most = [max(sum(len(row[name]) for name in text) for row in rows) for text in texts]
        return {"+".join(text): torch.ones(len(rows), size) for text, size in zip(texts, most, strict=True)}

    examples = [{name: [5] * columns[name][at] for name in columns} for at in range(len(min(columns.values())))]
    dataset: Any = Dataset.from_list(examples) if kind == "datasets" else examples
    largest = batches.largest_batch(dataset, widths, 2)
    for name, tensor in widths(examples).items():
        assert tensor.shape[1] == largest[name].shape[1], name


def test_of_a_large_data_set_some_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_EXAMPLES", 10)
    rows = Rows([1 + index % 7 for index in range(95)])
    batch = batches.largest_batch(rows, padding, 3)
    assert batch["input_ids"].shape[0] == 3
    assert len(rows.read) == 10
    assert {0, 90} <= rows.read, "evenly spread"


class Texts(Rows):
    """Rows that a collator is to tokenise, in a data set that has columns."""

    column_names = ("text",)


def test_rows_that_tell_no_length_are_not_all_read() -> None:
    rows = Texts([3, 9, 4], make=lambda ids: {"text": "a " * len(ids)})
    batch = batches.largest_batch(rows, lambda examples: {"input_ids": torch.ones(2, 5)}, 2)
    assert batch["input_ids"].shape[0] == 2
    assert rows.read == {0, 1}, "the first ones stand for all"


def test_whether_a_data_set_tells_its_longest_rows() -> None:
    assert batches.unknown_lengths(Rows([3, 9])) == ""
    assert batches.unknown_lengths(Dataset.from_dict({"input_ids": [[1], [2]]})) == ""
    told = "put the longest first"
    assert told in batches.unknown_lengths(Dataset.from_dict({"text": ["a", "b"]}))
    assert told in batches.unknown_lengths(Dataset.from_dict({"input_ids": [[1], [2]]}).to_iterable_dataset())
    assert told in batches.unknown_lengths(Rows([3], make=lambda ids: (torch.tensor(ids),)))
    assert told in batches.unknown_lengths([])


def test_rows_without_names_come_in_their_order() -> None:
    rows = Rows([3, 9, 4], make=lambda ids: (torch.tensor(ids),))
    batch = batches.largest_batch(rows, lambda examples: {"input_ids": examples[0][0][None]}, 1)
    assert batch["input_ids"].shape == (1, 3)


def test_an_empty_data_set() -> None:
    empty: Any = Stream(lambda: iter([]))
    for call in (
        lambda: batches.largest_batch(Rows([]), padding, 2),
        lambda: batches.first_example(Rows([])),
        lambda: batches.first_example(empty),
    ):
        with pytest.raises(DataError, match="The training set is empty"):
            call()
    assert batches.first_example(Rows([2]))["input_ids"] == [0, 1]


class Stream:
    """Rows without a length, from a function that is called at each iteration."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self.begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self.begin()


class Once(torch.utils.data.IterableDataset[Any]):
    """Rows of one iterator, which each iteration reads on with."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        yield from self.rows


class Shuffled(torch.utils.data.IterableDataset[Any]):
    """Other rows first at each iteration."""

    def __init__(self, rows: int) -> None:
        self.epochs, self.rows = itertools.count(), rows

    def __iter__(self) -> Iterator[Any]:
        order = random.Random(next(self.epochs))
        self.now = iter(order.sample(range(self.rows), self.rows))  # begun anew, so nothing is lost
        yield from self.now


@dataclass
class Record:
    """Cannot be compared."""

    ids: torch.Tensor


def test_a_stream_has_to_begin_anew() -> None:
    once = iter([5, 6])
    with pytest.raises(DataError, match="can be read only once"):
        batches.first_example(once)
    assert list(once) == [5, 6], "no row is lost"
    rest = iter(range(30))

    def rows() -> Iterator[int]:
        yield from rest

    streams = [
        Once(iter([{"input_ids": torch.tensor([i])} for i in range(48)])),
        Once(number for number in range(10**9)),
        Once(iter([5])),
        Stream(rows),
    ]
    for dataset in streams:
        with pytest.raises(DataError, match=r"\((Once|Stream)\) can be read only once"):
            batches.first_example(dataset)


@pytest.mark.parametrize("rows", [1, 1000])
def test_streams_that_begin_anew_are_taken(rows: int) -> None:
    numbers = Dataset.from_dict({"n": list(range(rows))}).to_iterable_dataset()
    texts = [{"input_ids": torch.arange(3), "pixels": np.zeros((2, 2)), "text": ("a", 1.0)}] * rows
    assert batches.first_example(numbers) == {"n": 0}
    assert batches.first_example(numbers.shuffle(seed=0, buffer_size=10))["n"] < 10
    assert batches.first_example(Stream(lambda: iter(texts))) is texts[0]
    assert batches.first_example(Shuffled(rows)) < rows
    assert isinstance(batches.first_example(Stream(lambda: map(Record, [torch.arange(2)] * rows))), Record)
