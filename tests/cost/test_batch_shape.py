"""Batches that are cut or made longer."""

from __future__ import annotations

import pytest
import torch
from rankpilot.cost.batch_shape import padded, reshaped
from rankpilot.cost.recording import BatchShape

END = 2


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (5, 4), (3, 12), (7, 9), (3, 6)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_every_row_keeps_its_end_token(shape: tuple[int, int], has_mask: bool) -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, END], [5, 6, END, 0, 0, 0], [5, 6, 7, 8, END, 0]])
    if not has_mask:
        tokens = tokens[:1].repeat(3, 1)
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 1, 0])}
    if has_mask:
        batch["attention_mask"] = (tokens != 0).long()
    result = reshaped(batch, BatchShape(*shape))["input_ids"]
    assert tuple(result.shape) == shape
    assert (result == END).sum(dim=1).tolist() == [1] * shape[0]
    assert result[:, 0].tolist() == [5] * shape[0]


@pytest.mark.parametrize("shape", [(2, 16), (2, 8), (3, 8), (1, 50)])
def test_texts_in_one_row_end_where_the_batch_does(shape: tuple[int, int]) -> None:
    """Flash attention reads as far as the last limit, whether or not there are so many tokens."""
    limits = torch.tensor([0, 5, 13, 32], dtype=torch.int32)
    tokens = torch.arange(32)[None]
    batch = {"input_ids": tokens, "cu_seq_lens_q": limits, "cu_seq_lens_k": limits, "max_length_q": 19}
    found = reshaped(batch, BatchShape(*shape))
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["cu_seq_lens_k"].tolist()[-1] == found["input_ids"].numel() == shape[0] * shape[1]
    assert found["cu_seq_lens_q"].diff().min() >= 0
    assert found["cu_seq_lens_q"].diff().max() <= found["max_length_q"]
    assert len(found["cu_seq_lens_q"]) == len(limits), "as many texts"


def test_each_part_of_a_batch_may_have_padding() -> None:
    """As in pairs of answers, whose longest rows may need none."""
    whole = {f"{part}_attention_mask": torch.ones(2, 4, dtype=torch.long) for part in ("chosen", "rejected")}
    found = padded(whole)
    assert [mask.sum().item() for mask in found.values()] == [7, 7]
    assert all(mask.all() for mask in whole.values())
    assert not any(mask.all() for mask in reshaped(found, BatchShape(2, 2)).values())
