"""What proxy models are trained on: windows of bytes, what should be predicted at each position, and the loss.

Labels are aligned with the logits: `labels[..., t]` is what the logits at position t should predict, IGNORED where
nothing is asked. So causal and masked language models, and classification by a label byte, share one loss.
"""

from __future__ import annotations

import numpy as np
import torch

from ...data.batches import IGNORED
from ..proxies.bases import MASK_TOKEN, ProxyBase

MASK_SHARE = 0.2
"""Share of the bytes that a masked language model has to fill in."""

FIRST_CLASS = ord("0")
"""Label byte of class 0; the classes follow one another."""

Inputs = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, int64 (rows, length) each."""


def language_inputs(base: ProxyBase, windows: torch.Tensor, generator: np.random.Generator) -> Inputs:
    """What a base reads and predicts of windows of text: the next byte, or the bytes hidden from it.

    Args:
        base: decides which.
        windows: int64 (rows, length).
        generator: hides bytes.
    """
    if base.masked:
        hidden = torch.from_numpy(generator.random(windows.shape) < MASK_SHARE)
        return windows.masked_fill(hidden, MASK_TOKEN), windows.masked_fill(~hidden, IGNORED)
    labels = torch.full_like(windows, IGNORED)
    labels[:, :-1] = windows[:, 1:]
    return windows, labels


def class_inputs(base: ProxyBase, windows: torch.Tensor, classes: torch.Tensor) -> Inputs:
    """Windows that end in a question: the byte of the class is to be predicted at the last position.

    So no new layer is needed (a verbaliser; Schick and Schütze, 2021, arXiv 2001.07676).

    Args:
        base: reads MASK_TOKEN there if it fills in masked bytes, else a line feed.
        windows: int64 (rows, length); the last byte is overwritten.
        classes: int64 (rows,), from 0.
    """
    inputs, labels = windows.clone(), torch.full_like(windows, IGNORED)
    inputs[:, -1] = MASK_TOKEN if base.masked else ord("\n")
    labels[:, -1] = FIRST_CLASS + classes
    return inputs, labels


def label_terms(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats at each position, (rows, length); 0 where nothing is asked.

    Args:
        logits: (rows, length, vocabulary).
        labels: int64 (rows, length).
    """
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def label_mean(terms: torch.Tensor, labels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """The mean of `label_terms` over the predictions of each group, (groups,)."""
    counts = (labels != IGNORED).view(groups, -1).sum(dim=1)
    return terms.view(groups, -1).sum(dim=1) / counts


def label_loss(logits: torch.Tensor, labels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Mean cross-entropy in nats for each prediction, shape (groups,).

    Args:
        logits: (groups * rows, length, vocabulary).
        labels: int64 (groups * rows, length), at least one prediction in each group.
        groups: how many runs share the batch, one after another.
    """
    return label_mean(label_terms(logits, labels), labels, groups)


def divergence_terms(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats at each position, (..., rows, length).

    Args:
        logits: the student's, (..., rows, length, vocabulary).
        teacher: log-probabilities, (rows, length, vocabulary).
    """
    student = torch.log_softmax(logits, dim=-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def divergence(logits: torch.Tensor, teacher: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Mean KL(teacher || student) in nats a position, shape (groups,).

    Args:
        logits: the student's, (groups * rows, length, vocabulary).
        teacher: log-probabilities for all groups, (rows, length, vocabulary).
        groups: how many runs share the batch, one after another.
    """
    return divergence_terms(torch.unflatten(logits, 0, (groups, -1)), teacher).view(groups, -1).mean(dim=1)
