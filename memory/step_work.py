"""What a training step computes, operator by operator, and the seconds that a device takes for it by its rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import ConfigError
from .autograd_flow import ModuleSet
from .step_time import StepTime

PARAMETER_BYTES = 44
"""Bytes that clipping and AdamW move for each parameter in fp32: the gradient is read three times and written once,
weight and both moments are read and written once each, and gradients are made and freed."""

OPERATOR_SECONDS = 5e-6
"""What an operator takes on a GPU beside its work, where nothing was measured; measured times correct it."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        flops: floating-point operations of large products; a product and a sum count as two.
        bytes: bytes of memory read and written.
        operator_seconds: what an operator takes beside its work.
    """

    flops: float
    bytes: float
    operator_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bytes > 0 and self.operator_seconds >= 0):
            raise ConfigError(f"Rates are above 0, and operators take no less than 0 seconds; got {self}.")


@dataclass(frozen=True, eq=False)
class StepWork:
    """The operators of a step in which every module is adapted at one small rank.

    Attributes:
        flops: floating-point operations of each, of products, convolutions and attention, (operators,).
        moved: bytes that it reads and writes, (operators,).
        backward: whether it belongs to the backward pass, bool (operators,).
        module: the target module whose adapter it belongs to, -1 for the frozen model, int64 (operators,).
        layer: the layer that can run again in whose forward or backward pass it is, -1 for none, int64 (operators,).
        needed: of the frozen model in the backward pass: bits of the modules of which one must be adapted.
        rank: of every module.
        widths: d_in + d_out of each module, int64 (modules,).
        layers: names of the layers that can run again.
        running_again: names of those that do in the step as it was set.
    """

    flops: FloatArray
    moved: FloatArray
    backward: BoolArray
    module: IntArray
    layer: IntArray
    needed: tuple[ModuleSet, ...]
    rank: int
    widths: IntArray
    layers: tuple[str, ...]
    running_again: tuple[str, ...]

    def time(self, rates: Rates) -> StepTime:
        """The seconds of any plan on a device of these rates.

        An operator of the frozen model takes the longer of its two times, for its operations and for its bytes (the
        roofline; Williams et al. 2009). Products inside adapters grow with the rank; what they read and write hardly
        does. So the operations of an adapter count for each rank, and its bytes once. The optimiser moves bytes alone.
        """
        count, frozen = len(self.widths), self.module < 0
        seconds = np.maximum(self.flops / rates.flops, self.moved / rates.bytes) + rates.operator_seconds
        fixed = self.moved / rates.bytes + rates.operator_seconds
        growing = self.flops / rates.flops / self.rank
        forward = frozen & ~self.backward
        groups, needs = self._groups(seconds)
        again = ~frozen & ~self.backward
        layer_of, layer_needs = self._layers()
        of_layer = forward & (self.layer >= 0)
        return StepTime(
            constant=float(seconds[forward].sum()),
            per_rank=self._by_module(growing, ~frozen, count) + PARAMETER_BYTES * self.widths / rates.bytes,
            adapters=self._by_module(fixed, ~frozen, count),
            groups=groups,
            needs=needs,
            layers=self.layers,
            running_again=self.running_again,
            layer_seconds=_sums(self.layer[of_layer], seconds[of_layer], len(self.layers)),
            layer_needs=layer_needs,
            layer_of=layer_of,
            again=self._by_module(fixed, again, count),
            again_per_rank=self._by_module(growing, again, count),
        )

    def _by_module(self, values: FloatArray, among: BoolArray, count: int) -> FloatArray:
        return _sums(self.module[among], values[among], count)

    def _groups(self, seconds: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Seconds and modules of the parts of the frozen model's backward pass that the same modules need."""
        sums: dict[ModuleSet, float] = {}
        for index in np.flatnonzero((self.module < 0) & self.backward).tolist():
            needed = self.needed[index]
            sums[needed] = sums.get(needed, 0.0) + float(seconds[index])
        needs = self._bits(list(sums))
        return np.array(list(sums.values())), needs

    def _layers(self) -> tuple[IntArray, BoolArray]:
        """The layer of each module, and the modules of which one must be adapted for each layer to run again."""
        layer_of = np.full(len(self.widths), -1)
        sets = [0] * len(self.layers)
        for index in np.flatnonzero(self.layer >= 0).tolist():
            layer, module = int(self.layer[index]), int(self.module[index])
            if module >= 0:
                layer_of[module] = layer
                sets[layer] |= 1 << module
            elif self.backward[index]:
                sets[layer] |= self.needed[index]
        return layer_of, self._bits(sets)

    def _bits(self, sets: list[ModuleSet]) -> BoolArray:
        """Which modules each set holds, bool (sets, modules); a set that counts always holds all."""
        count = len(self.widths)
        rows = [[bool(modules >> m & 1) or bool(modules >> count) for m in range(count)] for modules in sets]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), count)


def _sums(indices: IntArray, values: FloatArray, count: int) -> FloatArray:
    """The sum of the values at each index, (count,)."""
    return np.asarray(np.bincount(indices, values, minlength=count), dtype=np.float64)
