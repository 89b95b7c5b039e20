"""The probe: a few small training steps before the run, which measure the first signals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..common.arrays import FloatArray
from ..errors import NonFiniteError
from ..lora.signals import SignalMeter
from ..lora.targets import TargetModule

FIRST_LOSSES = 5
"""The first loss is the mean of this number of losses, from the probe's start; the last loss that of the last ones."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What the probe measured.

    Attributes:
        signals: (modules, len(SIGNALS)).
        first_loss: mean training loss of its first steps.
        fall: share of the first loss by which the last one is lower; 0 where it is unknown.
        predicted: share of the tokens whose prediction the loss counts, above 0: 1 where all are, as in language models
            as a rule, and little where a whole text is classified.
    """

    signals: FloatArray
    first_loss: float
    fall: float = 0.0
    predicted: float = 1.0

    @classmethod
    def of(cls, signals: FloatArray, losses: Sequence[float]) -> ProbeResult:
        """The result of a probe with these training losses, one a step."""
        first, last = (float(np.mean(part)) for part in (losses[:FIRST_LOSSES], losses[-FIRST_LOSSES:]))
        return cls(signals, first, 1 - last / first if first > 0 else 0.0)


def probe(
    targets: Sequence[TargetModule],
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[], torch.Tensor]],
    *,
    max_grad_norm: float = 1.0,
) -> ProbeResult:
    """Train the adapters for a few small steps, and measure the signals.

    Args:
        targets: the target modules. Their adapters train; the caller resets or restores them afterwards.
        optimizer: of the adapters' parameters, without state; of no use afterwards.
        losses: for each step a function that runs the forward pass on a micro-batch and returns the loss.
        max_grad_norm: gradients are clipped to this norm.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    meter = SignalMeter(targets)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history = []
    for closure in losses:
        loss = closure()
        history.append(float(loss.detach()))
        if not np.isfinite(history[-1]):
            raise NonFiniteError(
                f"The loss of probe step {len(history)} is {history[-1]}. Check the data and lower the learning rate."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        meter.accumulate()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return ProbeResult.of(meter.read(), history)
