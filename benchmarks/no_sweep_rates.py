"""Other ways to correct a learning rate while a run goes, beside rankpilot's control: each begins at the same rate.

All runs have the same number of optimizer steps, those of forks included, and the same warm-up and decay, by which what
a way has found is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from .text_runs import CLIP, factor_at
from .texts import TextTask

Batches = DataLoader[Any]


class RateFactor(Protocol):
    """Follows the steps of a run, and multiplies its rate by `value`."""

    value: float

    def look(self, loss: float, parameters: Sequence[nn.Parameter]) -> None:
        """The gradients of a step are there, and clipped."""

    def stepped(self, parameters: Sequence[nn.Parameter]) -> None:
        """The optimizer has stepped."""


EVERY = 10
"""Steps whose mean loss is looked at together."""


class Plateau:
    """torch's ReduceLROnPlateau on the mean training loss of every 10 steps: half the rate where two do not improve."""

    def __init__(self) -> None:
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self._schedule = ReduceLROnPlateau(self._optimizer, factor=0.5, patience=1)
        self._losses: list[float] = []
        self.value = 1.0

    def look(self, loss: float, parameters: Sequence[nn.Parameter]) -> None:
        """Note the loss."""
        self._losses.append(loss)
        if len(self._losses) % EVERY == 0:
            self._schedule.step(float(np.mean(self._losses[-EVERY:])))
            self.value = self._optimizer.param_groups[0]["lr"]

    def stepped(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is needed."""


@dataclass
class Hypergradient:
    """Hypergradient descent on the log of the rate (Baydin et al., ICLR 2018, arXiv 1703.04782, multiplicative form).

    The gradient of the loss in the rate of the last step is the product of the gradient now and of that step's update;
    it is normalised, as a cosine.

    Attributes:
        strength: of a step on the log of the rate.
    """

    strength: float
    value: float = 1.0
    _before: torch.Tensor | None = field(default=None, repr=False)
    _update: torch.Tensor | None = field(default=None, repr=False)

    def look(self, loss: float, parameters: Sequence[nn.Parameter]) -> None:
        """Move the rate."""
        gradient = torch.cat([each.grad.flatten() for each in parameters if each.grad is not None])
        if self._update is not None:
            cosine = torch.cosine_similarity(gradient, -self._update, dim=0)
            self.value *= math.exp(self.strength * float(torch.nan_to_num(cosine)))
        self._before = _flat(parameters)

    def stepped(self, parameters: Sequence[nn.Parameter]) -> None:
        """Note the update."""
        assert self._before is not None
        self._update = _flat(parameters) - self._before


def _flat(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in parameters if each.grad is not None])


def followed(make: Callable[[], RateFactor]) -> Callable[[TextTask, PeftModel, torch.optim.Optimizer, Batches], None]:
    """A way that follows a run's steps."""

    def train(task: TextTask, model: PeftModel, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
        factor, peak = make(), optimizer.param_groups[0]["lr"]
        for step, batch in enumerate(batches):
            _step(model, optimizer, batch, peak * factor_at(step, task.steps), factor)

    return train


FORKS = (1.0, 0.5, 2.0)
"""What multiplies the rate of each copy."""

ROUNDS = 2
"""How often copies are made."""


def forked(task: TextTask, model: PeftModel, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """Successive halving: when the rate has risen, twice, three copies go on for a twentieth of the run at their rates.

    The one whose losses are lowest in the second half of that stays. All steps of all copies count.
    """
    length, peak = task.steps // 20, optimizer.param_groups[0]["lr"]
    steps = task.steps - ROUNDS * (len(FORKS) - 1) * length
    warm = next(step for step in range(steps) if factor_at(step, steps) == 1.0)
    every, step = iter(batches), 0

    def advance(some: Sequence[Any]) -> list[float]:
        rates = [peak * factor_at(step + number, steps) for number in range(len(some))]
        return [_step(model, optimizer, batch, rate) for batch, rate in zip(some, rates, strict=True)]

    advance([*islice(every, warm)])
    step = warm
    for _ in range(ROUNDS):
        some, first, before = [*islice(every, length)], _copy(model, optimizer), peak
        found: list[tuple[float, float, Any]] = []
        for fork in FORKS:
            _restore(model, optimizer, first)
            peak = before * fork
            losses = advance(some)[length // 2 :]
            found.append((float(np.nan_to_num(np.mean(losses), nan=math.inf)), peak, _copy(model, optimizer)))
        _, peak, best = min(found, key=lambda each: each[0])
        _restore(model, optimizer, best)
        step += length
    advance([*islice(every, steps - step)])


def _copy(model: PeftModel, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], dict[str, Any]]:
    return [each.detach().clone() for each in _trained(model)], deepcopy(optimizer.state_dict())


def _restore(
    model: PeftModel, optimizer: torch.optim.Optimizer, copy: tuple[list[torch.Tensor], dict[str, Any]]
) -> None:
    with torch.no_grad():
        for parameter, value in zip(_trained(model), copy[0], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(deepcopy(copy[1]))


def _trained(model: PeftModel) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _step(
    model: PeftModel, optimizer: torch.optim.Optimizer, batch: Any, rate: float, factor: RateFactor | None = None
) -> float:
    """Take one step at a rate, times a factor that looks at the gradients first; returns the loss."""
    loss = model(**batch).loss
    loss.backward()
    trained = [*_trained(model)]
    nn.utils.clip_grad_norm_(trained, CLIP)
    if factor:
        factor.look(loss.item(), trained)
    for group in optimizer.param_groups:
        group["lr"] = rate * (factor.value if factor else 1.0)
    optimizer.step()
    if factor:
        factor.stepped(trained)
    optimizer.zero_grad()
    return float(loss.detach())


CORRECTIONS: dict[str, Callable[[TextTask, PeftModel, torch.optim.Optimizer, Batches], None]] = {
    "reduced on a plateau": followed(Plateau),
    "hypergradient, .02": followed(lambda: Hypergradient(0.02)),
    "hypergradient, .1": followed(lambda: Hypergradient(0.1)),
    "hypergradient, .3": followed(lambda: Hypergradient(0.3)),
    "forks": forked,
}
"""Ways by name; hypergradients of three strengths, since no one is advised for adapters."""
