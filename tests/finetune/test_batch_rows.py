"""The rows of a batch, told apart and put together again in parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.errors import UnsupportedError
from rankpilot.finetune.step.batch_rows import NEXT_TOKENS, ROWS, SHARES, SUM, TOKENS, BatchRows, Cuts

LENGTHS = (3, 6, 2, 5)


def padded(lengths: tuple[int, ...] = LENGTHS, side: str = "right", size: int | None = None) -> dict[str, torch.Tensor]:
    """Rows that hold their own number, padded with zeros; no loss counts padding."""
    size = size or max(lengths)
    ids = torch.zeros(len(lengths), size, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, slice(length) if side == "right" else slice(size - length, None)] = row + 1
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows_of(batch: Any, each: int = 1) -> BatchRows:
    return BatchRows.of(batch, Cuts.seen_in([batch], left=True), each)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_part_has_its_rows_and_no_padding_that_all_of_them_have(side: str) -> None:
    rows = rows_of(padded(side=side))
    assert rows.lengths.tolist() == list(LENGTHS)
    part = rows.part([0, 2])
    expected = padded((3, 2), side)
    assert torch.equal(part["attention_mask"], expected["attention_mask"])
    assert part["input_ids"].unique().tolist() == [0, 1, 3]
    assert part["labels"].shape == (2, 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_as_far_as_a_multiple_asks_for_it(side: str) -> None:
    rows = rows_of(padded(side=side))
    part = rows.part([2], multiple=4)
    assert part["input_ids"].shape == (1, 4)
    assert int(part["attention_mask"].sum()) == 2
    assert rows.part([1], multiple=4)["input_ids"].shape == (1, 6)


def test_a_batch_of_all_rows_without_padding_to_cut_is_the_batch() -> None:
    batch = padded()
    assert rows_of(batch).part(range(4)) is batch
    wide = rows_of(padded(size=9)).part(range(4))
    assert wide["input_ids"].shape == (4, 6)


def test_labels_that_count_are_no_padding() -> None:
    batch = padded()
    batch["labels"][2, 3] = 7
    assert rows_of(batch).lengths.tolist() == [3, 6, 4, 5]


def test_inputs_without_a_mask_are_read_whole() -> None:
    batch = padded()
    del batch["attention_mask"]
    rows = rows_of(batch)
    assert rows.lengths.tolist() == [6] * 4
    assert rows.part([2])["input_ids"].shape == (1, 6)


def test_the_two_sides_of_an_encoder_decoder_are_cut_each_to_its_own_rows() -> None:
    batch = padded()
    labels = torch.tensor([[4, 4, -100], [4, -100, -100], [4, 4, 4], [4, -100, -100]])
    rows = rows_of({**batch, "labels": labels, "decoder_input_ids": labels.clamp(min=0)})
    part = rows.part([1, 3])
    assert part["input_ids"].shape == (2, 6)
    assert part["labels"].tolist() == [[4], [4]]
    assert part["decoder_input_ids"].shape == (2, 1)
    assert rows.lengths.tolist() == [4, 6, 6, 5], "a long answer counts in proportion to the text"


def test_what_has_an_entry_for_each_row_follows_it() -> None:
    scores = torch.arange(24.0).view(4, 6)
    batch = padded() | {"scores": scores, "names": ["a", "b", "c", "d"], "weight": torch.tensor(2.0), "on": True}
    part = rows_of(batch).part([1, 2])
    assert torch.equal(part["scores"], scores[1:3]), "numbers are no tokens, however many there are"
    assert part["names"] == ["b", "c"]
    assert float(part["weight"]) == 2.0
    assert part["on"] is True
    nested = rows_of({"first": padded(), "labels": torch.arange(4)}).part([3])
    assert nested["first"]["input_ids"].shape == (1, 5)
    assert nested["labels"].tolist() == [3]


def test_pairs_stay_together() -> None:
    chosen, rejected = padded((3, 6), size=6), padded((5, 2), size=6)
    batch = {"input_ids": torch.cat([chosen["input_ids"], 10 * rejected["input_ids"]])}
    batch["attention_mask"] = torch.cat([chosen["attention_mask"], rejected["attention_mask"]])
    batch["reference"] = torch.tensor([0.5, 0.7])
    rows = rows_of(batch, 2)
    assert (rows.examples, rows.lengths.tolist()) == (2, [5, 6])
    part = rows.part([0])
    assert part["input_ids"].amax(dim=1).tolist() == [1, 10]
    assert part["input_ids"].shape == (2, 5)
    assert part["reference"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"pixel_values": torch.zeros(4, 8)}, "pixel_values contains images"),
        ({"speech": torch.zeros(11, 8)}, "speech has 11 entries, but the batch has 4 rows"),
        ({"images": ["one"]}, "images has 1 entries"),
        ({"cu_seq_lens_q": torch.arange(4)}, "cu_seq_lens_q"),
    ],
)
def test_what_belongs_to_no_row_is_named(extra: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        rows_of(padded() | extra)


def test_shares_of_parts_add_up_to_the_batch() -> None:
    rows = rows_of(padded())
    parts = [[1, 3], [0, 2]]
    assert rows.shares(parts, SUM) == [1.0, 1.0]
    assert rows.shares(parts, ROWS) == [0.5, 0.5]
    assert rows.shares(parts, TOKENS) == [11 / 16, 5 / 16]
    assert rows.shares(parts, NEXT_TOKENS) == [9 / 12, 3 / 12]
    classes = rows_of(padded() | {"labels": torch.arange(4)})
    assert all(np.isclose(sum(classes.shares(parts, kind)), 1) for kind in SHARES if kind != SUM)


def test_an_axis_holds_tokens_only_if_it_follows_their_number() -> None:
    """Features of 6 numbers are none, also in a batch whose texts have 6 tokens."""
    features, weights = torch.arange(24.0).view(4, 6, 1), torch.ones(4, 6)
    short, batch = (
        padded((2, 1)),
        padded() | {"features": features, "weights": weights, "tags": features[..., 0].long()},
    )
    seen = short | {"features": features[:2], "weights": weights[:2, :2], "tags": features[:2, :, 0].long()}
    cuts = Cuts.seen_in([seen, batch], left=False)
    assert cuts.groups == (frozenset({"input_ids", "attention_mask", "labels", "weights"}),)
    part = BatchRows.of(batch, cuts).part([0, 2])
    assert {name: tuple(value.shape) for name, value in part.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "labels", "weights"), (2, 3)),
        **{"features": (2, 6, 1), "tags": (2, 6)},
    }


def test_padding_on_the_left_is_cut_only_where_no_position_counts() -> None:
    batch = padded(side="left")
    rows = BatchRows.of(batch, Cuts.seen_in([batch], left=False))
    assert rows.lengths.tolist() == [6] * 4
    assert rows.part([0, 2])["input_ids"].shape == (2, 6)


def test_rows_without_a_label_that_counts_have_no_share() -> None:
    batch = padded() | {"labels": torch.tensor([1, -100, 2, 0])}
    assert rows_of(batch).shares([[0, 1], [2, 3]], TOKENS) == pytest.approx([1 / 3, 2 / 3])
