"""The seconds of a training step under any plan: ranks, depth, and checkpointed layers.

A step consists of the forward pass, under any plan; the backward pass down to the lowest adapted module; the adapters'
work, partly proportional to rank; and recomputation of checkpointed layers. As with bytes, seconds split into a
constant, a part per rank, and *groups* paid once if any of certain modules is adapted. They follow from the step's
operators and the rates of a device. The operators on a batch of any shape follow from counts at three lengths.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.arrays import BoolArray, FloatArray, IntArray
from ..common.checks import finite
from ..common.errors import ConfigError
from .cost import ModuleSet
from .recording import BatchShape
from .tile_size import LEAST_TOKENS, TILES


@dataclass(frozen=True, eq=False)
class PlanSeconds:
    """The seconds of a step under any plan whose checkpointed layers are given.

    Attributes:
        constant: seconds under any plan.
        per_rank: seconds per rank of each module, (modules,).
        groups: seconds of each group, paid once if any of certain modules is adapted, (groups,).
        needs: modules that need each group, bool (groups, modules).
    """

    constant: float
    per_rank: FloatArray
    groups: FloatArray
    needs: BoolArray

    def __call__(self, plans: IntArray) -> FloatArray:
        """Return the seconds of plans: ranks (..., modules) -> seconds (...)."""
        paid = self.needs[:, plans > 0].any(axis=1) if plans.ndim == 1 else (plans > 0).astype(float) @ self.needs.T > 0
        seconds: FloatArray = self.constant + paid @ self.groups + plans @ self.per_rank
        return seconds

    @classmethod
    def from_state(cls, state: Mapping[str, Any], modules: int) -> PlanSeconds:
        """Rebuild seconds from their attributes; arrays may have become tensors in between.

        Raises:
            LookupError, TypeError, ValueError: they are not those of this many modules.
        """
        arrays = {name: np.asarray(state[name]) for name in ("per_rank", "groups", "needs")}
        groups = len(arrays["groups"])
        for name, shape in {"per_rank": (modules,), "groups": (groups,), "needs": (groups, modules)}.items():
            values = arrays[name]
            if values.shape != shape or not np.isfinite(values).all():
                raise ValueError(f"{name} of the step time has shape {values.shape}, not {shape}, or is not finite")
        return cls(finite(np.asarray(state["constant"]).item()), **arrays)


@dataclass(frozen=True, eq=False)
class StepTime:
    """The seconds of a training step under any plan. All values are at least 0.

    Attributes:
        constant: seconds under any plan: the forward pass of the frozen model, and the loss.
        per_rank: seconds per rank of each module, forward and backward, (modules,).
        adapters: rank-independent seconds of each adapter, (modules,).
        groups: seconds of parts of the frozen model's backward pass, (groups,).
        needs: modules that each need such a part, bool (groups, modules).
        layers: names of the checkpointable layers, in forward order.
        running_again: names of those checkpointed in the step as configured.
        layer_seconds: seconds to recompute each layer, without its adapters, (layers,).
        layer_needs: modules that need the recomputation, bool (layers, modules).
        layer_of: the layer of each module, -1 for none, int64 (modules,).
        again: rank-independent seconds to recompute each adapter, (modules,).
        again_per_rank: seconds per rank to recompute it, (modules,).
    """

    constant: float
    per_rank: FloatArray
    adapters: FloatArray
    groups: FloatArray
    needs: BoolArray
    layers: tuple[str, ...]
    running_again: tuple[str, ...]
    layer_seconds: FloatArray
    layer_needs: BoolArray
    layer_of: IntArray
    again: FloatArray
    again_per_rank: FloatArray

    def of_plans(self, layers: Collection[str] | None = None) -> PlanSeconds:
        """Return the seconds of plans with these layers checkpointed, by default those of the configured step."""
        layers = self.running_again if layers is None else layers
        runs = np.array([name in layers for name in self.layers], dtype=np.bool_)
        inside = np.append(runs, False)[self.layer_of]  # the last entry is for modules outside layers, with index -1
        adapters = self.adapters + np.where(inside, self.again, 0.0)
        modules = np.eye(len(self.per_rank), dtype=np.bool_)
        return PlanSeconds(
            self.constant,
            self.per_rank + np.where(inside, self.again_per_rank, 0.0),
            np.concatenate([self.groups, adapters, self.layer_seconds[runs]]),
            np.concatenate([self.needs, modules, self.layer_needs[runs]]),
        )

    def seconds(self, ranks: IntArray, layers: Collection[str] | None = None) -> float:
        """Return the seconds of a plan, int64 (modules,); see `of_plans`."""
        return float(self.of_plans(layers)(ranks))

    def times(self, factor: float) -> StepTime:
        """Return the seconds of a step with this many times the work."""
        names = ("per_rank", "adapters", "groups", "layer_seconds", "again", "again_per_rank")
        scaled = {name: factor * getattr(self, name) for name in names}
        return replace(self, constant=factor * self.constant, **scaled)


PARAMETER_BYTES = 44
"""Bytes that clipping and AdamW move per fp32 parameter: the gradient is read three times and written once, the weight
and both moments are read and written once each, and gradients are allocated and freed.
"""

OPERATOR_SECONDS = 5e-6
"""Overhead of an operator on the device of a run."""

LAUNCH_SECONDS = 22e-6
"""Host time to launch a GPU operator (20 steps on an A100: `python -m benchmarks published-time`)."""


@dataclass(frozen=True)
class Rates:
    """The rates of a device, per second.

    Attributes:
        flops: floating-point operations of large products; a multiply-add counts as two.
        bytes: bytes of memory read and written.
        operator_seconds: overhead of an operator if each waits for the one before.
        launch_seconds: host time to launch an operator while the device runs earlier ones.
    """

    flops: float
    bytes: float
    operator_seconds: float = 0.0
    launch_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bytes > 0 and self.operator_seconds >= 0 and self.launch_seconds >= 0):
            raise ConfigError(f"Rates must be above 0, and operator times at least 0 seconds; got {self}.")


@dataclass(frozen=True, eq=False)
class StepWork:
    """The operators of a step with every module adapted at one small rank.

    Attributes:
        flops: floating-point operations of products, convolutions and attention, (operators,).
        moved: bytes read and written, (operators,).
        backward: whether each belongs to the backward pass, bool (operators,).
        module: target module whose adapter it belongs to, -1 for the frozen model, int64 (operators,).
        layer: the checkpointable layer whose passes contain it, -1 for none, int64 (operators,).
        needed: for the frozen model's backward pass, bits of the modules that each require the operator.
        rank: rank of every module.
        widths: d_in + d_out of each module, int64 (modules,).
        layers: names of the checkpointable layers.
        running_again: names of those checkpointed in the step as configured.
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
        """Return the seconds of any plan on a device with these rates.

        An operator of the frozen model takes the longer of its compute and memory times (the roofline model; Williams
        et al. 2009). Products inside adapters grow with the rank; their memory traffic hardly does. An adapter's
        operations therefore count per rank, and its bytes once. The optimizer only moves bytes.

        A step takes at least as long as all its launches. If those exceed all work with every module adapted, they
        alone set the time of any plan.
        """
        plan, work = np.full(len(self.widths), self.rank), self._time(rates)
        launches = self._time(Rates(math.inf, math.inf, rates.launch_seconds))
        return max(work, launches, key=lambda time: time.seconds(plan))

    def _time(self, rates: Rates) -> StepTime:
        """Return the seconds of any plan, without launches."""
        count, frozen = len(self.widths), self.module < 0
        seconds = np.maximum(self.flops / rates.flops, self.moved / rates.bytes) + rates.operator_seconds
        fixed = self.moved / rates.bytes + rates.operator_seconds
        growing = self.flops / rates.flops / self.rank
        forward = frozen & ~self.backward
        groups, needs = self._groups(seconds)
        again = ~frozen & ~self.backward
        layer_of, layer_needs = self._layers()
        of_layer = forward & (self.layer >= 0)
        layer_seconds = _sums(self.layer[of_layer], seconds[of_layer], len(self.layers))
        return StepTime(
            constant=float(seconds[forward].sum()),
            per_rank=self._by_module(growing, ~frozen, count) + PARAMETER_BYTES * self.widths / rates.bytes,
            adapters=self._by_module(fixed, ~frozen, count),
            groups=groups,
            needs=needs,
            layers=self.layers,
            running_again=self.running_again,
            layer_seconds=layer_seconds,
            layer_needs=layer_needs,
            layer_of=layer_of,
            again=self._by_module(fixed, again, count),
            again_per_rank=self._by_module(growing, again, count),
        )

    def _by_module(self, values: FloatArray, among: BoolArray, count: int) -> FloatArray:
        return _sums(self.module[among], values[among], count)

    def _groups(self, seconds: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Return seconds and modules of the frozen model's backward pass, grouped by the modules that need it."""
        sums: dict[ModuleSet, float] = {}
        for index in np.flatnonzero((self.module < 0) & self.backward).tolist():
            needed = self.needed[index]
            sums[needed] = sums.get(needed, 0.0) + float(seconds[index])
        needs = self._bits(list(sums))
        return np.array(list(sums.values())), needs

    def _layers(self) -> tuple[IntArray, BoolArray]:
        """Return the layer of each module, and the modules that each cause a layer to be recomputed."""
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
        """Unpack sets into bool (sets, modules); a set that always counts contains all modules."""
        count = len(self.widths)
        width = count // 8 + 1
        written = np.frombuffer(b"".join(modules.to_bytes(width, "little") for modules in sets), dtype=np.uint8)
        bits = np.unpackbits(written, bitorder="little").reshape(len(sets), 8 * width) > 0
        return bits[:, :count] | bits[:, count : count + 1]


def _sums(indices: IntArray, values: FloatArray, count: int) -> FloatArray:
    """Sum the values at each index, (count,)."""
    return np.asarray(np.bincount(indices, values, minlength=count), dtype=np.float64)


MASK_ALIGNMENT = 16
"""The memory-efficient kernel copies a mask unless its row length is a multiple of this."""


def counted_shapes(shape: BatchShape) -> tuple[BatchShape, ...]:
    """Return the counted shapes: that of a recording, half its length, and about three quarters.

    The last two differ by a multiple of `MASK_ALIGNMENT`, so mask rows are aligned in both or in neither. Rows are
    numerous enough for the loss to have all its tiles.
    """
    half = max(shape.length // 2, 2)
    between = half + shape.length // 64 * MASK_ALIGNMENT if shape.length >= 64 else max(shape.length // 4, 2)
    rows = max(shape.rows, -(-TILES * LEAST_TOKENS // max(half - 1, 1)))
    return tuple(BatchShape(rows, length) for length in (shape.length, half, between))


@dataclass(frozen=True, eq=False)
class WorkGrowth:
    """The computation of a step per operator, at `counted_shapes`, or at the only supported shape.

    Attributes:
        shapes: the counted shapes.
        work: the work at the first of them.
        flops: floating-point operations of each operator at each shape, (shapes, operators).
        moved: bytes it reads and writes, (shapes, operators).
    """

    shapes: tuple[BatchShape, ...]
    work: StepWork
    flops: FloatArray
    moved: FloatArray

    @classmethod
    def of(cls, shapes: Sequence[BatchShape], works: Sequence[StepWork]) -> WorkGrowth | None:
        """Fit the growth to counts at these shapes; None if their operators differ."""
        first, *others = works
        for other in others:
            if first.needed != other.needed or not all(
                np.array_equal(getattr(first, name), getattr(other, name)) for name in ("backward", "module", "layer")
            ):
                return None
        flops, moved = (np.stack([getattr(work, name) for work in works]) for name in ("flops", "moved"))
        return cls(tuple(shapes), first, flops, moved)

    def at(self, shape: BatchShape) -> StepWork:
        """Return the computation of the step on a batch of this shape."""
        if shape == self.shapes[0]:
            return self.work
        return replace(self.work, flops=self._grown(self.flops, shape), moved=self._grown(self.moved, shape))

    def _grown(self, counted: FloatArray, shape: BatchShape) -> FloatArray:
        """Extrapolate a constant and two parts per row: proportional to the length, and to its square."""
        powers = np.array([[1, each.rows * each.length, each.rows * each.length**2] for each in self.shapes])
        parts = np.linalg.solve(powers.astype(np.float64), counted)
        here = np.array([1, shape.rows * shape.length, shape.rows * shape.length**2], dtype=np.float64)
        grown: FloatArray = np.maximum(np.round(here @ parts), 0.0)
        return grown
