"""Which learning rate a plan wants: a rule for plain LoRA on a model, and the factor of a plan beside plain LoRA.

Plain LoRA has rank 8 on all modules. Everything is a sum of logarithms, fitted on fine-tunes of models of width 64 to
8192 (`python -m benchmarks rates`, docs/learning_rate.md), for Adam and its kin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..lora.spec import REFERENCE_RANK

REFERENCE_SCALE = 2.0
"""The scale of plain LoRA in the fit: `lora_alpha` 16 at rank 8."""

RATE = 6.1e-4
"""The rate of plain LoRA on a model of `WIDTH`, in a run of `STEPS` steps of `TOKENS`, from a loss of 1 nat."""

WIDTH, STEPS, TOKENS = 2048, 200, 400

OF_WIDTH, OF_STEPS, OF_TOKENS, OF_LOSS = -0.43, -0.17, 0.17, 0.8
"""Powers of width / `WIDTH`, steps / `STEPS`, tokens of a step / `TOKENS` and loss before training in the rate."""

MOST_TOKENS = 2000
"""Steps of more tokens have the rate of this many: their gradients have little noise left to average."""

OF_RANK, OF_SCALE, OF_SHARE = 0.0, -0.25, -0.5
"""Powers of rank / 8, of scale / (scale of plain LoRA), and of the share of the modules that are adapted."""


@dataclass(frozen=True)
class Look:
    """What the first look at a run shows.

    Attributes:
        loss: before training, in nats a token.
        tokens: that the loss of an optimizer step counts.
    """

    loss: float = 1.0
    tokens: float = MOST_TOKENS


TYPICAL = Look()
"""An instruction tune of a language model."""


def rule_rate(width: int, steps: int, scale: float = REFERENCE_SCALE, look: Look = TYPICAL) -> float:
    """The peak learning rate of plain LoRA under Adam.

    A text that the model hardly knows wants a higher rate than one that is near to what it has read: it has farther to
    go. That shows in the loss before training.

    Args:
        width: of the model's hidden states, at least 1.
        steps: optimizer steps of the run, at least 1.
        scale: of plain LoRA: alpha / 8, or alpha / sqrt(8) under rsLoRA.
        look: at the run.
    """
    powers = (
        (width / WIDTH, OF_WIDTH),
        (steps / STEPS, OF_STEPS),
        (min(max(look.tokens, 1.0), MOST_TOKENS) / TOKENS, OF_TOKENS),
        (max(look.loss, LEAST_LOSS), OF_LOSS),
        (scale / REFERENCE_SCALE, OF_SCALE),
    )
    return float(f"{RATE * math.prod(value**power for value, power in powers):.3g}")


LEAST_LOSS = 0.1
"""A lower loss before training counts as this."""


def plan_factor(ranks: IntArray, scales: FloatArray, plain_scales: FloatArray) -> float:
    """By what the learning rate of plain LoRA is multiplied under a plan; 1 for plain LoRA, and for no adapter.

    Args:
        ranks: of the modules, (modules,).
        scales: the factor in front of each adapter's output, (modules,).
        plain_scales: the same at rank 8, (modules,).
    """
    adapted = ranks > 0
    if not adapted.any():
        return 1.0
    rank = np.log(ranks[adapted] / REFERENCE_RANK).mean()
    scale = np.log(scales[adapted] / plain_scales[adapted]).mean()
    return math.exp(OF_RANK * rank + OF_SCALE * scale + OF_SHARE * math.log(adapted.mean()))
