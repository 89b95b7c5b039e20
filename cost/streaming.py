"""Streamed layers, in bytes and seconds: what stays on the device, what main memory holds, and copies that do not hide.

A streamed layer's frozen weights are on the device only while it runs (`cost/savers/streamed_base.py`). Two layers are
there at once: the running one and the next. A copy hides behind the computation of the layers in between, so it costs
time only where a layer has few tokens to compute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..common.errors import UnknownNameError
from .cards import USUAL_CARD, device_table, find_device_spec
from .step_time import LAUNCH_SECONDS, Rates, StepTime

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


BUS_SHARE = 0.75
"""Share of the bus's nominal rate that copies from pinned memory reach: 12 of 15.75 GB/s on PCI Express 3."""

LEAST_BYTES = 2**16
"""Smaller tensors, such as norms, stay on the device."""

ON_DEVICE = 2
"""Number of streamed layers on the device at once."""


def spread(streamed: int, count: int) -> list[int]:
    """Return the indices of the streamed layers among all, spread evenly: a copy then hides behind several layers."""
    return [index * count // streamed for index in range(streamed)]


@dataclass(frozen=True)
class BaseLayers:
    """The frozen weights of a model's repeated layers.

    Attributes:
        count: number of layers.
        sizes: bytes of each storage of a layer that can be streamed; layers are alike.
    """

    count: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, frozen: Sequence[int], count: int) -> BaseLayers:
        """Find the storages that each layer has.

        Where layers differ, those that not all have are left out, so fewer bytes are streamed than could be.

        Args:
            frozen: bytes of each storage of the frozen model.
            count: number of layers.
        """
        times = Counter(size for size in frozen if size >= LEAST_BYTES)
        return cls(count, tuple(size for size, number in times.items() for _ in range(number // count if count else 0)))

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer that can be streamed."""
        return sum(self.sizes)

    def on_device(self, frozen: Sequence[int], streamed: int) -> tuple[int, ...]:
        """Return the bytes of each storage on the device at once, with this many streamed layers.

        Args:
            frozen: bytes of each storage of the frozen model.
            streamed: number of streamed layers.
        """
        away = Counter({size: number * max(streamed - ON_DEVICE, 0) for size, number in Counter(self.sizes).items()})
        kept = []
        for size in frozen:
            if away[size] > 0:
                away[size] -= 1
            else:
                kept.append(size)
        return tuple(kept)

    def exposed_seconds(self, streamed: int, forward: float, backward: float, bus_bytes_per_s: float) -> float:
        """Return the seconds per step by which copies exceed the computation that hides them.

        Args:
            streamed: number of streamed layers, evenly spread.
            forward: seconds of the layers' forward passes.
            backward: seconds of their backward passes, with recomputation.
            bus_bytes_per_s: rate of copies to the device.
        """
        if not streamed:
            return 0.0
        copy = self.layer_bytes / bus_bytes_per_s
        rest = (streamed - 1) * copy  # nothing hides the first one, and the backward pass begins with the last one
        return copy + max(rest - forward, 0.0) + max(rest - backward, 0.0)


def kept_layers(
    base: BaseLayers, spare: tuple[float, float], again: int, seconds: float, bus_bytes_per_s: float
) -> int:
    """Return the number of layers to keep on the device, where all could stream.

    Either the fewest layers are checkpointed, or, if estimated to take no longer, the fewest are streamed.

    Args:
        base: the frozen weights of the layers.
        spare: bytes left while all layers stream, with none checkpointed and with all; equal where none may be.
        again: fewest layers to checkpoint while all stream.
        seconds: estimated time of a step without checkpointing.
        bus_bytes_per_s: the rate that copies to the device reach.
    """
    count = base.count

    def time(kept: int, layers: int) -> float:
        forward, step = SECOND_RUN * seconds, seconds * (1 + SECOND_RUN * layers / count)
        return step + base.exposed_seconds(count - kept, forward, step - forward, bus_bytes_per_s)

    kept, other = (min(max(int(room // base.layer_bytes), 0), count) for room in spare)
    if time(other, count) <= time(kept, again):
        kept = other
    return count if count - kept <= ON_DEVICE else kept  # as many are on the device anyway


@dataclass(frozen=True)
class StreamedTime:
    """The time of a step with a streamed base.

    Attributes:
        resident: the time with the whole base on the device.
        layers: names of the checkpointable layers.
        base: the frozen weights of the layers.
        streamed: number of streamed layers.
        bus_bytes_per_s: nominal rate of the bus to the device.
    """

    resident: StepTime
    layers: tuple[str, ...]
    base: BaseLayers
    streamed: int
    bus_bytes_per_s: float

    def seconds(self, ranks: IntArray, checkpointed: Collection[str] = ()) -> float:
        """Return the seconds of a plan, int64 (modules,), with the names of its checkpointed layers."""
        whole = self.resident.seconds(ranks, checkpointed)
        if not self.streamed:
            return whole
        rate = BUS_SHARE * self.bus_bytes_per_s
        forward = self.resident.seconds(ranks, self.layers) - self.resident.seconds(ranks, ())
        return whole + self.base.exposed_seconds(self.streamed, forward, whole - forward, rate)
