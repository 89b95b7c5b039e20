"""The learning rate of a plan: a rule for plain LoRA on a model, and a plan's factor relative to plain LoRA.

Plain LoRA has rank 8 on all modules. The rule is a product of powers, for Adam and its variants. From a width of 1,024
on it is the common constant, 3e-4 at `lora_alpha` 32: on held-out models, no rule of width and rank is surely better
(docs/learning-rate.md). Below, the power of width interpolates to the rates of small models (`python -m benchmarks
rates`). A published rule of this form depends on the width alone: 5e-4 (2000 / width)^.781 for Llama (Schulman et al.,
LoRA without regret, 2025).

For a new model, the best rate lies somewhere in a `RateRange`, and a rate too high costs more than one too low by the
same factor. The rule therefore errs on the low side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ...common.arrays import FloatArray, IntArray
from ...lora.spec import REFERENCE_RANK

REFERENCE_SCALE = 2.0
"""`lora_alpha` 16 at rank 8."""

WIDE = 1024
"""Wider models use the rate of this width."""

SPREAD = 0.55
"""Standard deviation of log(best rate / predicted rate) on held-out models."""

ENDS = 0.1
"""Share of models with a best rate below the lower end of an interval, and share above the upper end."""

BELOW = 0.25
"""Share of models with a best rate below the rule's.

If left uncorrected, a rate too high costs three times as much as one too low by the same factor. With correction
during the run, both cost about the same, and little (docs/learning-rate.md). Such a run starts at the lower end of the
interval, since it can catch up later.
"""

MOST_TOKENS = 2000
"""Steps with more tokens use the rate of this many: their gradients have little noise left to average."""

LEAST_SHARE = 0.25
"""Plans adapting a smaller share of the modules use the factor of this share: no smaller one was measured."""

LEAST_LOSS = 0.1
"""Lower bound of the loss before training."""


@dataclass(frozen=True)
class InitialLoss:
    """Known properties of a run before its first step.

    Attributes:
        loss: loss before training, in nats per token.
        tokens: tokens counted in the loss of an optimizer step.
    """

    loss: float = 1.0
    tokens: float = MOST_TOKENS


TYPICAL = InitialLoss()
"""Typical instruction tuning of a language model."""


@dataclass(frozen=True)
class RateRange:
    """Interval of the best rate of plain LoRA on a new model.

    Attributes:
        low: a tenth of such models need less. A run with rate correction starts here.
        middle: half of them need less.
        high: a tenth of them need more.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def around(cls, rate: float) -> RateRange:
        """Interval around the rule's rate, itself below the middle."""
        lean = NormalDist().inv_cdf(BELOW)
        return cls(*(rate * math.exp(SPREAD * (NormalDist().inv_cdf(share) - lean)) for share in (ENDS, 0.5, 1 - ENDS)))


@dataclass(frozen=True)
class RateRule:
    """Peak learning rate as a product of powers.

    Attributes:
        rate: rate of plain LoRA at width 1024 and scale 2, in a run of 200 steps of 400 tokens, from a loss of 1 nat.
        of_width: power of the width of hidden states, up to `WIDE`.
        of_steps: power of the optimizer steps of the run.
        of_tokens: power of the tokens per step, up to `MOST_TOKENS`.
        of_loss: power of the loss before training. An unfamiliar text needs a larger change.
        of_scale: power of the scale of plain LoRA, alpha / 8 (alpha / sqrt(8) under rsLoRA), and of a plan's scale
            relative to it.
        of_rank: power of the rank of a plan's modules at constant scale. At constant alpha, the scale decreases with
            the rank, and the rate is constant.
        of_share: power of the share of adapted modules.
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
        """Rate of plain LoRA, to three digits.

        Args:
            width: width of the model's hidden states, at least 1.
            steps: optimizer steps of the run, at least 1.
            scale: scale of plain LoRA.
            initial: the loss before training, and the tokens per step.
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
        """Factor of a plan on the rate of plain LoRA; 1 for plain LoRA, and for no adapter.

        Args:
            ranks: ranks of the modules, (modules,).
            scales: factor on each adapter's output, (modules,).
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
"""The fitted rule."""
