"""A batch without contents, in the form that a model's head takes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..batch_shape import BatchShape


def hollow_batch(model: PreTrainedModel, shape: BatchShape) -> dict[str, torch.Tensor]:
    """Token ids, a mask and labels on the default device; labels have one axis for a classifier of whole rows.

    An encoder-decoder writes texts of the same length.
    """
    tokens = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    name = type(model).__name__
    rows_only = name.endswith("ForSequenceClassification")
    regression = rows_only and model.config.num_labels == 1
    labels = torch.zeros(shape.rows, dtype=torch.float32 if regression else torch.long) if rows_only else tokens.clone()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
