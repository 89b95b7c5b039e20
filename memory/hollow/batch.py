"""A batch without contents, in the form that a model's head takes."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..batch_shape import BatchShape

MASK_ALIGNMENT = 16
"""The memory-efficient kernel copies a mask whose rows are no multiple of this long."""


def calibration_shape(config: PreTrainedConfig, shape: BatchShape, *, padded: bool) -> BatchShape:
    """A shape, at least as large, such that all steps of a calibration on it run the operators that `shape` runs.

    Calibration halves lengths. So half of this length is beyond an attention window that `shape` is beyond, and a
    multiple of `MASK_ALIGNMENT` where there is padding. Without contents larger steps cost nothing.
    """
    text = config.get_text_config()
    windows = [getattr(text, name, None) or 0 for name in ("sliding_window", "local_attention", "attention_window")]
    length = max([shape.length, *(2 * w for w in windows if isinstance(w, int) and 0 < w <= shape.length)])
    if padded:
        length += -length % (2 * MASK_ALIGNMENT)
    return BatchShape(max(shape.rows, 4), length)


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
