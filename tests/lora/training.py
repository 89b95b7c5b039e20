"""A training loop on causal language models, logits, and the product of a pair, for tests of rank changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rankpilot.lora.targets import TargetModule
from torch import nn


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[torch.Tensor]) -> list[float]:
    """Take one step on each batch of tokens, which are the labels too; return the losses."""
    losses = []
    for tokens in batches:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode, without a graph."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens).logits
    return found


def product(target: TargetModule) -> torch.Tensor:
    """Scaling times B A, in fp64."""
    return target.scaling * target.weight_b.detach().double() @ target.weight_a.detach().double()
