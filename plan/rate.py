"""Which learning rate a plan wants: a rule for plain LoRA on a model, and the factor of a plan beside plain LoRA.

Plain LoRA has rank 8 on all modules. The rule multiplies powers, for Adam and its variants. From a width of 1,024 on it
is the constant that people take, 3e-4 at `lora_alpha` 32: on models left out no rule of width and rank is surely better
(docs/learning-rate.md). Below, the power of width leads on from there to what small models want (`python -m benchmarks
rates`). A published rule of this form has the width alone: 5e-4 (2000 / width)^.781 for Llama (Schulman et al., LoRA
without regret, 2025).

A model that nobody fitted has its best rate somewhere in a `RateRange`, and a rate that is too high costs more than one
as far too low. So the rule leans low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..lora.spec import REFERENCE_RANK

REFERENCE_SCALE = 2.0
"""`lora_alpha` 16 at rank 8."""

WIDE = 1024
"""Wider models have the rate of this width."""

SPREAD = 0.55
"""Standard deviation of the log of the best rate over what is told of it, on models left out."""

ENDS = 0.1
"""The share of models whose best rate is below the lower end of an interval, and of those that are above the upper."""

BELOW = 0.25
"""The share of models whose best rate is below what the rule says.

Left alone, a rate costs three times as much where it is too high as where it is as far too low. Where steps correct it
both cost about as much, and little (docs/control.md). Such a run begins at the lower end of the interval, since what it
has not learned at first it can learn later.
"""

MOST_TOKENS = 2000
"""Steps of more tokens have the rate of this many: their gradients have little noise left to average."""

LEAST_SHARE = 0.25
"""Plans that adapt a smaller share of the modules have the factor of this: no narrower one was measured."""

LEAST_LOSS = 0.1
"""A lower loss before training counts as this."""


@dataclass(frozen=True)
class InitialLoss:
    """What is known of a run before its first step.

    Attributes:
        loss: before training, in nats a token.
        tokens: that the loss of an optimizer step counts.
    """

    loss: float = 1.0
    tokens: float = MOST_TOKENS


TYPICAL = InitialLoss()
"""An instruction tune of a language model."""


@dataclass(frozen=True)
class RateRange:
    """Where the best rate of plain LoRA lies on a model that nobody fitted.

    Attributes:
        low: a tenth of such models want less. A run whose steps correct the rate begins here.
        middle: half of them want less.
        high: a tenth of them want more.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def around(cls, rate: float) -> RateRange:
        """The interval of what the rule says, which is below the middle."""
        lean = NormalDist().inv_cdf(BELOW)
        return cls(*(rate * math.exp(SPREAD * (NormalDist().inv_cdf(share) - lean)) for share in (ENDS, 0.5, 1 - ENDS)))


@dataclass(frozen=True)
class RateRule:
    """The peak of the learning rate as a product of powers.

    Attributes:
        rate: of plain LoRA at width 1024 and scale 2, in a run of 200 steps of 400 tokens, from a loss of 1 nat.
        of_width: power of the width of hidden states, up to `WIDE`.
        of_steps: of the optimizer steps of the run.
        of_tokens: of the tokens of a step, up to `MOST_TOKENS`.
        of_loss: of the loss before training. A text that the model hardly knows has farther to go.
        of_scale: of the scale of plain LoRA, alpha / 8 (alpha / sqrt(8) under rsLoRA), and of that of a plan beside it.
        of_rank: of the rank of a plan's modules at one scale. With one alpha the scale falls as the rank rises, and
            the rate stays.
        of_share: of the share of the modules that are adapted.
    """

    rate: float = 6.2e-4
    of_width: float = -0.64
    of_steps: float = -0.17
    of_tokens: float = 0.17
    of_loss: float = 0.64
    of_scale: float = -1.0
    of_rank: float = -1.0
    of_share: float = -0.3

    def plain(self, width: int, steps: int, scale: float = REFERENCE_SCALE, initial: InitialLoss = TYPICAL) -> float:
        """The rate of plain LoRA, to three digits.

        Args:
            width: of the model's hidden states, at least 1.
            steps: optimizer steps of the run, at least 1.
            scale: of plain LoRA.
            initial: the loss before training, and the tokens of a step.
        """
        tokens = min(max(initial.tokens, 1.0), MOST_TOKENS)
        powers = (
            (min(width, WIDE) / WIDE, self.of_width),
            (steps / 200, self.of_steps),
            (tokens / 400, self.of_tokens),
            (max(initial.loss, LEAST_LOSS), self.of_loss),
            (scale / REFERENCE_SCALE, self.of_scale),
        )
        return float(f"{self.rate * math.prod(value**power for value, power in powers):.3g}")

    def factor(self, ranks: IntArray, scales: FloatArray, plain_scales: FloatArray) -> float:
        """By what a plan multiplies the rate of plain LoRA; 1 for plain LoRA, and for no adapter.

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
        share = math.log(max(adapted.mean(), LEAST_SHARE))
        return math.exp(self.of_rank * rank + self.of_scale * scale + self.of_share * share)


RULE = RateRule()
"""The rule, as it was fitted."""
