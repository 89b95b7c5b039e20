"""A training step: the loss as a function of the batch, and what takes memory beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError

LossFunction = Callable[[Any], torch.Tensor]
"""Runs the forward pass of a training step on a batch, and returns the loss with its graph."""


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A training step that a loop takes.

    Attributes:
        model: the PEFT model, on its device.
        loss: the loss of a batch.
        optimizer: decides the bytes of state; AdamW's two tensors count without one.
        rows_per_example: rows of a batch that one example takes; see `reshaped`.
        accumulates: whether gradients are there all the time, because they are kept over several batches of each step.
        bucket_copies: how often the loop holds all gradients besides, all the time, to send them to other processes.
    """

    model: nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer | None
    rows_per_example: int = 1
    accumulates: bool = False
    bucket_copies: float = 0.0


def checked_loss(loss: LossFunction) -> LossFunction:
    """A loss that raises UnsupportedError where the function returns something else than a tensor of one number."""

    def checked(batch: Any) -> torch.Tensor:
        value = loss(batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UnsupportedError(
                f"The loss function returned {got}. It has to return the loss of the batch as a tensor of one number, "
                "with its graph, such as `model(**batch).loss`."
            )
        return value

    return checked


def model_loss(model: nn.Module) -> LossFunction:
    """The loss that a transformers model returns for a batch that holds labels.

    The function raises UnsupportedError if the model returns none.
    """

    def loss(batch: Any) -> torch.Tensor:
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise UnsupportedError(
                f"{type(model).__name__} returned no loss, so no step can be measured. Give its batches labels, or "
                "pass the function that computes your loss."
            )
        result: torch.Tensor = value
        return result

    return loss
