"""Seconds of rows that run together, estimated from a model and a device without a measurement.

Work grows with the tokens, and attention with their square in each row. A part also has launch overhead. A GPU works
while the next operators are launched, so a part takes the longer of both: below the tokens that fill the card, smaller
parts are not faster. A CPU does both in sequence.

Seconds use published rates, not measured ones, so runs with the same seed split steps identically.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.errors import UnknownNameError
from .cards import USUAL_CARD, device_table, find_device_spec
from .step_time import LAUNCH_SECONDS, Rates

PROCESSOR_FLOPS, PROCESSOR_LAUNCH = 1.5e11, 7e-6
"""Assumed fp32 operations per second of one CPU core, and the overhead of an operator in seconds: steps of MiniLM and
SmolLM2-135M had 1.5e11 and 1.6e11, and 5e-6 and 8e-6.
"""

SECOND_RUN = 0.375
"""Cost of recomputing all layers as a share of a step: one forward pass of about two and two thirds."""

WORK = 4
"""Operations per frozen weight and token: a multiply-add, in the forward pass and for the input gradient."""


@dataclass(frozen=True)
class PartSeconds:
    """The seconds of a part.

    Attributes:
        of_token: seconds per token, excluding attention.
        attention: seconds per token for each token in its row.
        launches: seconds to launch all operators.
        overlaps: whether work overlaps with launches.
        layers: number of checkpointable layers.
    """

    of_token: float
    attention: float
    launches: float
    overlaps: bool
    layers: int

    @classmethod
    def of_sizes(
        cls, sizes: tuple[int, int], operators: int, layers: int, rates: Rates, *, overlaps: bool
    ) -> PartSeconds:
        """Estimate the seconds of a model with known `product_sizes`; see `overlaps`."""
        weights, width = sizes
        attention = WORK * max(layers, 1) * width * 2 / rates.flops
        return cls(WORK * weights / rates.flops, attention, rates.launch_seconds * operators, overlaps, layers)

    def __call__(self, rows: IntArray, lengths: IntArray, layers: int) -> FloatArray:
        """Return the seconds of parts with given rows and lengths, (parts,), and this many checkpointed layers."""
        work = rows * lengths * (self.of_token + self.attention * lengths)
        whole = np.maximum(work, self.launches) if self.overlaps else work + self.launches
        again: FloatArray = whole * (1 + SECOND_RUN * layers / max(self.layers, 1))
        return again

    @property
    def filling_tokens(self) -> int:
        """Tokens whose work takes as long as a part's launches: fewer leave a card idle."""
        return int(self.launches / max(self.of_token, 1e-30))


def published_rates(card: str, dtype: str) -> Rates:
    """Return a card's published rates for products of one dtype; unknown cards are taken for a usual one.

    Args:
        card: name of the card, as its driver tells it; empty for one CPU core.
        dtype: "bf16", "fp16" or "fp32".
    """
    if not card:
        return Rates(PROCESSOR_FLOPS, math.inf, launch_seconds=PROCESSOR_LAUNCH)
    try:
        rates = find_device_spec(card).rates
    except UnknownNameError:
        rates = None
    rates = rates or device_table()[USUAL_CARD].rates
    assert rates is not None, "cards of the table have rates"
    return Rates(rates.flops_per_s.get(dtype, rates.flops_per_s["fp32"]), math.inf, launch_seconds=LAUNCH_SECONDS)
