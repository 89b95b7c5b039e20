"""What share of the tokens of a batch the loss asks about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rankpilot.data.batches import IGNORED, count_predictions, predicted_share

TOKENS = torch.ones(4, 10, dtype=torch.int64)
MASK = TOKENS.clone()
MASK[0, 6:] = 0
ANSWERS = torch.full((4, 10), IGNORED)
ANSWERS[:, 7:] = 5
COUNTS: dict[str, tuple[Any, tuple[int, int]]] = {
    "a language model": ({"input_ids": TOKENS, "labels": TOKENS}, (40, 40)),
    "one with padding, which labels ignore": (
        {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS.where(MASK > 0, IGNORED)},
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
    assert count_predictions(batch) == counts


def test_the_share_of_several_batches() -> None:
    assert predicted_share([(4, 40), (4, 10)]) == pytest.approx(8 / 50)
    assert predicted_share([(0, 40)]) > 0, "its logarithm is taken"
    assert predicted_share([(0, 0)]) == 1
