"""Record a model through a few of its layers, if they are alike.

Layers of a large model are identical, or alternate between a few kinds. A layer between two others of its kind creates,
saves and frees the same tensors as any such layer. The model is therefore recorded with only its first few layers, and
the full recording repeats the operators of one layer, or of one period of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...common.arrays import BoolArray, IntArray
from ...common.errors import RankPilotError
from ...lora.targets import TargetModule, find_target_modules
from ..batch_shape import Batch
from ..cost import ModuleSet
from ..growth import Growth
from ..model import MemoryModel, ModelStates
from ..recording import NEVER, Recording, Segment
from ..step_time import StepWork
from ..training_step import CHECKPOINT, TrainingStep
from .calibration import CUT_FAILS, measure_memory, step_states
from .work import count_work

_PEFT = "base_model.model."
"""Prefix of the base model's module names in a PEFT model; names of target modules lack it."""

WORTH_IT = 0.75
"""Largest share of layers recorded for all others."""


@dataclass(frozen=True, eq=False)
class RepeatedLayers:
    """The recorded layers that represent all layers of a model.

    Attributes:
        owner: the module with the layers.
        name: name of the list of layers in its owner.
        prefix: prefix of the layers' names in the base model, with the dot.
        period: number of layers after which their kinds repeat.
        first: number of layers before the first one that others repeat.
        below: number of layers between these and the repeated period, equal to its last ones.
        count: number of layers in the whole model.
    """

    owner: nn.Module
    name: str
    prefix: str
    period: int
    first: int
    below: int
    count: int

    @property
    def bottom(self) -> int:
        """Index of the first layer of the repeated period."""
        return self.first + self.below

    @property
    def top(self) -> int:
        """Index of the first layer above the repeated period."""
        return self.bottom + self.period

    @property
    def kept(self) -> int:
        """Number of recorded layers, from the first on; at least one is above the repeated period."""
        return self.top + (self.count - self.top - 1) % self.period + 1

    @property
    def more(self) -> int:
        """Number of times the period is repeated."""
        return (self.count - self.kept) // self.period

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[TargetModule]) -> list[RepeatedLayers]:
        """Return ways to cut a model's layers, the best first.

        Empty unless one list holds all target modules within checkpointable layers.
        """
        marked = {name for name, module in model.named_modules() if CHECKPOINT in vars(module)}
        adapted = [f"{_PEFT}{target.name}." for target in targets]
        lists = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and f"{name}.0" in marked
            and any(target.startswith(f"{name}.") for target in adapted)
        }
        if len(lists) != 1:
            return []
        [(name, layers)] = lists.items()
        configs = {id(each): each for module in model.modules() if (each := vars(module).get("config")) is not None}
        types = [each for config in configs.values() if (each := getattr(config, "layer_types", None))]
        kinds = [(_kind(layer), [each[i] for each in types if i < len(each)]) for i, layer in enumerate(layers)]
        owner, _, own = name.rpartition(".")
        found = [
            cls(model.get_submodule(owner), own, f"{name.removeprefix(_PEFT)}.", period, first, period, len(kinds))
            for period in range(1, len(kinds) // 2)
            for first in (_before(kinds, period), _before(kinds, period) + 1)
        ]
        return sorted((each for each in found if each.kept <= WORTH_IT * each.count), key=lambda each: each.kept)[:2]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Cut the model to the recorded layers inside the context."""
        whole = getattr(self.owner, self.name)
        setattr(self.owner, self.name, nn.ModuleList(whole[: self.kept]))
        try:
            yield
        finally:
            setattr(self.owner, self.name, whole)

    def number(self, name: str) -> int:
        """Return the index of a module's layer; -1 outside the layers."""
        parts = self._parts(name)
        return parts[1] if parts else -1

    def moved(self, name: str, periods: int) -> str:
        """Return the name of the same module in a layer some periods above."""
        parts = self._parts(name)
        return name if parts is None else f"{parts[0]}{parts[1] + periods * self.period}{parts[2]}"

    def _parts(self, name: str) -> tuple[str, int, str] | None:
        before, found, after = name.partition(self.prefix)
        number, dot, rest = after.partition(".")
        if not found or before not in ("", _PEFT):
            return None
        return before + found, int(number), dot + rest

    def repeated(
        self, memory: MemoryModel, model: nn.Module, targets: Sequence[TargetModule], states: ModelStates
    ) -> MemoryModel | None:
        """Extend the byte model of the cut model to the whole model.

        Args:
            memory: byte model of the cut model, with all layers checkpointed.
            model: the whole model.
            targets: its target modules.
            states: bytes held by its adapters and optimizer.

        Returns:
            The byte model; None if the layers turn out to differ.
        """
        recording = memory.recording
        if [self.number(segment.name) for segment in recording.segments] != [*range(self.kept)]:
            return None
        tiling = _Tiling.of(recording, self)
        if tiling is None or not tiling.is_regular():
            return None
        names, origin = [name for name, _ in model.named_modules()], tiling.copies[0]
        growth: dict[str, Any] = {
            each.name: value[origin]
            for each in fields(Growth)
            if isinstance(value := getattr(memory._growth, each.name), np.ndarray)
        }
        return replace(
            memory,
            states=states,
            recording=_Whole(tiling, names, [target.name for target in targets]).recording(),
            _base=memory._base[origin],
            _slope=memory._slope[origin],
            _growth=replace(memory._growth, **growth),
        )

    def repeated_work(self, work: StepWork, model: nn.Module, targets: Sequence[TargetModule]) -> StepWork | None:
        """Extend the computation of a step of the cut model to the whole model; see `repeated`."""
        if [self.number(name) for name in work.running_again] != [*range(self.kept)]:
            return None
        layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
        widths = np.array([target.d_in + target.d_out for target in targets], dtype=np.int64)
        return _Copies(self, [target.name for target in targets]).work(work, layers, widths)


def _kind(layer: nn.Module) -> Any:
    """Return everything that determines a layer's computation: its modules, parameters and settings."""
    modules = [(name, type(module), _settings(module)) for name, module in layer.named_modules()]
    return modules, [(name, each.shape, each.dtype, each.requires_grad) for name, each in layer.named_parameters()]


_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")
"""Attribute names for the index of a layer."""


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    plain = (bool, int, float, str, tuple, type(None))
    return [(name, value) for name, value in vars(module).items() if isinstance(value, plain) and name not in _NUMBERS]


def _before(kinds: Sequence[Any], period: int) -> int:
    """Return the number of layers, at least one, before those whose kinds repeat up to the last layer."""
    first = len(kinds) - period
    while first > 1 and kinds[first - 1] == kinds[first - 1 + period]:
        first -= 1
    return first


@dataclass(frozen=True, eq=False)
class _Tiling:
    """Extends a recording by copies of one period.

    Copies run in order in the forward pass, and in reverse in the backward pass. Copy 0 is the recorded period.
    Unrepeated parts count as copy -1 if they come before all copies in the forward pass or after them in the backward
    pass, and as one past the highest copy in between. A span excludes its start time and includes its end.

    Attributes:
        recorded: the recording of the cut model.
        layers: the cut of the model.
        forward: span of the period in the forward pass.
        backward: span in the backward pass.
        below: number of operators of the layers below the period, in each pass.
        above: the same for the recorded layers above it.
    """

    recorded: Recording
    layers: RepeatedLayers
    forward: tuple[int, int]
    backward: tuple[int, int]
    below: tuple[int, int]
    above: tuple[int, int]

    @classmethod
    def of(cls, recorded: Recording, layers: RepeatedLayers) -> _Tiling | None:
        """Create the tiling of a recording; None if a layer of the period or the one below has no backward pass."""
        back = recorded.created > recorded.forward_end
        order = range(layers.top - 1, layers.bottom - 2, -1)
        created = [recorded.created[back & (recorded.segment_index == number)] for number in order]
        if not all(map(len, created)):
            return None
        starts = [segment.start for segment in recorded.segments[layers.bottom : layers.top + 1]]
        begun = [int(times.min()) - 1 for times in created]
        low, high = layers.below, layers.kept - layers.top
        below = starts[-1] - starts[-1 - low], begun[low] - begun[0]
        above = starts[high] - starts[0], begun[-1] - begun[-1 - high]
        return cls(recorded, layers, (starts[0], starts[-1]), (begun[0], begun[-1]), below, above)

    @cached_property
    def ahead(self) -> int:
        return self.forward[1] - self.forward[0]

    @cached_property
    def back(self) -> int:
        return self.backward[1] - self.backward[0]

    def is_regular(self) -> bool:
        """True if the layers below create and free the same storages as the last ones of the period."""
        begun = (self.forward[1] - self.below[0], self.ahead), (self.backward[0], -self.back)
        for (start, shift), count in zip(begun, self.below, strict=True):
            end = start + count
            own, below = self.within(start, end), self.within(start - shift, end - shift)
            if len(own) != len(below) or not np.array_equal(self._known_of(own, 0), self._known_of(below, 1)):
                return False
        return True

    def within(self, start: int, end: int) -> IntArray:
        created = self.recorded.created
        return np.flatnonzero((created > start) & (created <= end))

    def _known_of(self, serials: IntArray, below: int) -> IntArray:
        """Return sizes and times of storages created `below` periods down.

        Times near that period are relative to the repeated one.
        """
        recorded = self.recorded
        ends = [self._seen_from(times[serials], below) for times in (recorded.created, recorded.freed)]
        return np.stack([recorded.sizes[serials], recorded.uses_saved[serials], *ends])

    def _seen_from(self, times: IntArray, below: int) -> IntArray:
        ahead, back = self._near(times, below)
        return np.where(ahead, times + below * self.ahead, np.where(back, times - below * self.back, times))

    def _near(self, times: IntArray, below: int = 0) -> tuple[BoolArray, BoolArray]:
        """Return masks of times near a period `below` down: in its forward pass, and in its backward pass.

        The forward pass of the layers above and the backward passes of both neighbours count as near too.
        """
        ahead = times - (self.forward[0] - below * self.ahead)
        back = times - (self.backward[0] + below * self.back)
        (further, earlier), later = self.above, self.back + self.below[1]
        return (ahead > 0) & (ahead <= self.ahead + further), (back > -earlier) & (back <= later)

    @cached_property
    def copies(self) -> tuple[IntArray, IntArray, IntArray]:
        """Return the recorded storage, copy and creation time of each storage of the whole recording."""
        created = self.recorded.created
        serials = np.arange(len(created))
        repeated = np.zeros(len(created), dtype=np.bool_)
        repeated[self.within(*self.forward)] = repeated[self.within(*self.backward)] = True
        above = ~repeated & (created > self.forward[1]) & (created <= self.backward[0])
        parts = [serials[~repeated & ~above], *[serials[repeated]] * (self.layers.more + 1), serials[above]]
        origin = np.concatenate(parts)
        copies = np.repeat(np.arange(-1, self.layers.more + 2), [*map(len, parts)])
        times = self.times(created[origin], origin, copies)
        order = np.lexsort((origin, times))
        return origin[order], copies[order], times[order]

    def times(self, times: IntArray, origin: IntArray, copies: IntArray) -> IntArray:
        """Map times of recorded storages to those of their copies; all (storages,)."""
        more = self.layers.more
        all_ahead, all_back = more * self.ahead, more * self.back
        after_period = (self.forward[1] < times) & (times <= self.backward[0])
        in_backward = (self.backward[0] < times) & (times <= self.backward[1])
        from_above = self.recorded.created[origin] > self.forward[1]
        # Where neither the time nor the storage belongs to a copy, all copies of the forward pass have run, and of the
        # backward pass those that come before the recorded period, unless the storage is of the layers above.
        outside = np.select(
            [times <= self.forward[1], after_period, in_backward & from_above],
            [times, times + all_ahead, times + all_ahead],
            times + all_ahead + all_back,
        )
        of_period = (copies >= 0) & (copies <= more)
        ahead, back = self._near(times)
        return np.select(
            [times == NEVER, of_period & back, of_period & ahead],
            [times, times + all_ahead + (more - copies) * self.back, times + copies * self.ahead],
            outside,
        )


class _Copies:
    """Maps modules of the cut model, and sets of them, to the view of each copy of the period.

    Args:
        layers: the cut of the model.
        targets: names of the target modules of the whole model.
    """

    def __init__(self, layers: RepeatedLayers, targets: Sequence[str]) -> None:
        self._layers, self._targets = layers, tuple(targets)
        self._target_numbers = {name: number for number, name in enumerate(targets)}
        self._kept = [name for name in targets if layers.number(name) < layers.kept]
        self._above: int = layers.more + 1  # the copy for everything above
        self._set = cache(self._new_set)
        self._bits, self._lower = cache(self._new_bits), cache(self._lower_copies)

    def _numbers(self, recorded: Sequence[str], whole: Sequence[str]) -> IntArray:
        """Return the index in the whole model, by copy and index of a recorded name.

        The last row is for copy -1, and the last column is -1, for none.
        """
        numbers = {name: number for number, name in enumerate(whole)}
        copies = (*range(self._above + 1), -1)
        rows = [[numbers[self._name(name, copy)] for name in recorded] + [-1] for copy in copies]
        return np.array(rows, dtype=np.int64)

    def _name(self, name: str, copy: int) -> str:
        """Return a recorded module's name as seen from a copy of the period."""
        layers, number = self._layers, self._layers.number(name)
        if number < layers.bottom:
            return name
        return layers.moved(name, min(max(copy, 0), layers.more) if number < layers.top else layers.more)

    def _new_set(self, modules: ModuleSet, copy: int) -> ModuleSet:
        """Return the whole model's modules for those of a recorded storage or segment.

        Whatever depends on a module of a layer depends on everything below, through the residual stream.
        """
        layers = self._layers
        if copy < 0 and modules & self._up_to(layers.kept) & ~self._up_to(layers.bottom):
            copy = self._above  # shared by all layers, such as a mask
        found, bits = 0, self._bits(copy)
        for number in range(modules.bit_length()):
            if modules >> number & 1:
                found |= bits[number]
        end = layers.top if copy == self._above else layers.bottom
        return found | self._lower(copy) if modules & self._up_to(end) else found

    def _up_to(self, end: int) -> ModuleSet:
        """Return the recorded target modules in layers below one."""
        return sum(1 << i for i, name in enumerate(self._kept) if 0 <= self._layers.number(name) < end)

    def _new_bits(self, copy: int) -> list[ModuleSet]:
        """Return each recorded target module's bit in a copy's view, and the bit for what always trains."""
        layers, found = self._layers, []
        for name in self._kept:
            near = layers.first <= layers.number(name) < layers.bottom and 0 <= copy < self._above
            found.append(self._bit(layers.moved(name, copy) if near else self._name(name, copy)))
        return [*found, 1 << len(self._targets)]

    def _lower_copies(self, copy: int) -> ModuleSet:
        """Return all target modules from the layers below the copies up to those below a copy."""
        first, end = self._layers.first, self._layers.first + copy * self._layers.period
        return sum(self._bit(name) for name in self._targets if first <= self._layers.number(name) < end)

    def _bit(self, name: str) -> ModuleSet:
        return 1 << self._target_numbers[name]

    def work(self, work: StepWork, layers: Sequence[str], widths: IntArray) -> StepWork | None:
        """Extend the computation per operator to the whole model; None if the period below differs.

        Args:
            work: computation of the cut model.
            layers: `StepWork.layers` of the whole model.
            widths: its `StepWork.widths`.
        """
        cut, bottom, top = self._layers, self._layers.bottom, self._layers.top
        of_row = np.array([*map(cut.number, work.layers), -1])[work.layer]
        known = np.stack([work.flops, work.moved, np.where(of_row < 0, -1, (of_row - cut.first) % cut.period)])

        def begin(layer: int, backward: bool) -> int:
            return int(np.flatnonzero((of_row == layer) & (work.backward == backward))[0])

        ahead, back = (begin(bottom, False), begin(top, False)), (begin(top - 1, True), begin(bottom - 1, True))
        alike = (begin(top - cut.below, False), ahead[1]), (back[0], begin(top - cut.below - 1, True))
        for (start, end), below in zip(alike, (ahead[0] - ahead[1], back[1] - back[0]), strict=True):
            if not np.array_equal(known[:, start:end], known[:, start + below : end + below]):
                return None
        rows, often = np.arange(len(of_row)), self._above
        parts = [rows[: ahead[0]], *[rows[slice(*ahead)]] * often, rows[ahead[1] : back[0]]]
        parts += [*[rows[slice(*back)]] * often, rows[back[1] :]]
        copies = np.repeat([-1, *range(often), often, *range(often)[::-1], -1], [*map(len, parts)])
        origin, again = np.concatenate(parts), work.running_again
        return replace(
            work,
            **{name: getattr(work, name)[origin] for name in ("flops", "moved", "backward")},
            module=self._numbers(self._kept, self._targets)[copies, work.module[origin]],
            layer=self._numbers(work.layers, layers)[copies, work.layer[origin]],
            needed=tuple(
                self._set(work.needed[row], copy) for row, copy in zip(origin.tolist(), copies.tolist(), strict=True)
            ),
            widths=widths,
            layers=tuple(layers),
            running_again=(
                *again[:bottom],
                *(self._name(name, copy) for copy in range(often) for name in again[bottom:top]),
                *(self._name(name, often) for name in again[top:]),
            ),
        )


class _Whole(_Copies):
    """Builds the recording of a whole model.

    Args:
        tiling: tiling of the cut model's recording.
        names: names of all modules of the whole model.
        targets: names of its target modules.
    """

    def __init__(self, tiling: _Tiling, names: Sequence[str], targets: Sequence[str]) -> None:
        super().__init__(tiling.layers, targets)
        self._tiling, self._recorded, self._names = tiling, tiling.recorded, tuple(names)
        self._origin, self._copies, self._created = tiling.copies
        count = len(self._recorded.created)
        # The storage of the whole recording, by copy (the last row is -1) and recorded storage.
        self._serials = np.full((self._above + 2, count), -1)
        self._serials[self._copies, self._origin] = np.arange(len(self._origin))
        single = np.maximum(self._serials[-1], self._serials[self._above])
        self._serials = np.where(single < 0, self._serials, single)
        self._serials[self._above] = np.where(single < 0, self._serials[self._layers.more], single)
        self._is_repeated = single < 0
        self._in_period = len(tiling.within(*tiling.forward))

    def recording(self) -> Recording:
        """Return the recording."""
        recorded, origin = self._recorded, self._origin
        moved = partial(self._tiling.times, origin=origin, copies=self._copies)
        layers = [f"{self._layers.prefix}{number}" for number in range(self._layers.count)]
        names, segments = self._numbers(recorded.names, self._names), self._numbers(layers[: self._layers.kept], layers)
        targets = self._numbers(self._kept, self._targets)
        gradients = sorted(self._each(recorded.gradients), key=lambda each: each[2])  # in the order of the layers
        return Recording(
            sizes=recorded.sizes[origin],
            created=self._created,
            freed=moved(recorded.freed[origin]),
            freed_if_unsaved=moved(recorded.freed_if_unsaved[origin]),
            name_index=names[self._copies, recorded.name_index[origin]],
            target_index=targets[self._copies, recorded.target_index[origin]],
            segment_index=segments[self._copies, recorded.segment_index[origin]],
            needed={new: self._set(modules, copy) for new, _, copy, modules in self._each(recorded.needed)},
            needed_later={
                new: tuple((self._time(time, old, copy), self._set(modules, copy)) for time, modules in phases)
                for new, old, copy, phases in self._each(recorded.needed_later)
            },
            on_context_until={
                new: self._time(time, old, copy) for new, old, copy, time in self._each(recorded.on_context_until)
            },
            uses_saved=recorded.uses_saved[origin],
            gradients={new: int(targets[copy, target]) for new, _, copy, target in gradients},
            added_at={new: self._time(time, old, copy) for new, old, copy, time in self._each(recorded.added_at)},
            names=self._names,
            forward_end=recorded.forward_end + self._layers.more * self._tiling.ahead,
            segments=tuple(self._segments()),
        )

    def _each(self, recorded: Mapping[int, Any]) -> Iterator[tuple[int, int, int, Any]]:
        """Yield the new storage, recorded storage, copy and value, for values by recorded storage."""
        for serial, value in recorded.items():
            if self._is_repeated[serial]:
                for copy in range(self._above):
                    yield int(self._serials[copy, serial]), serial, copy, value
            else:
                new = int(self._serials[-1, serial])
                yield new, serial, int(self._copies[new]), value

    def _time(self, time: int, serial: int, copy: int) -> int:
        return int(self._tiling.times(*(np.array([value]) for value in (time, serial, copy)))[0])

    def _segments(self) -> Iterator[Segment]:
        segments, bottom, top = self._recorded.segments, self._layers.bottom, self._layers.top
        yield from (self._segment(each, -1) for each in segments[:bottom])
        for copy in range(self._above):
            yield from (self._segment(each, copy) for each in segments[bottom:top])
        yield from (self._segment(each, self._above) for each in segments[top:])

    def _segment(self, segment: Segment, copy: int) -> Segment:
        later = self._tiling.ahead * min(max(copy, 0), self._layers.more)
        serials = partial(self._serial_for, copy=copy)
        return replace(
            segment,
            start=segment.start + later,
            end=segment.end + later,
            inputs=tuple(map(serials, segment.inputs)),
            outputs=tuple(map(serials, segment.outputs)),
            name=self._name(segment.name, copy),
            saved={serials(serial): self._set(modules, copy) for serial, modules in segment.saved.items()},
        )

    def _serial_for(self, serial: int, copy: int) -> int:
        """Return a segment copy's storage for a recorded one; one of the layers below maps to the copy below."""
        start, created = self._tiling.forward[0], self._recorded.created[serial]
        if 0 < copy < self._above and start - self._tiling.below[0] < created <= start:
            return int(self._serials[copy - 1, serial + self._in_period])
        return int(self._serials[copy, serial])


def measure_by_layers(
    training: TrainingStep, targets: list[TargetModule], batch: Batch, ways: list[RepeatedLayers]
) -> MemoryModel:
    """Return a step's byte model from the first workable cut of its layers; unworkable cuts are removed.

    Once a whole period is known to equal the one above, further steps of the model show it with a single layer.
    """
    while ways:
        if memory := _of_few_layers(training, targets, batch, ways[0]):
            if ways[0].below > 1:
                ways.insert(0, replace(ways[0], below=1))
            return memory
        ways.pop(0)
    return measure_memory(training, targets, batch, signals=False)


def _of_few_layers(
    training: TrainingStep, targets: list[TargetModule], batch: Batch, layers: RepeatedLayers
) -> MemoryModel | None:
    """Measure a step's byte model with a few of its layers; None if they do not represent all."""
    with suppress(RankPilotError, AttributeError, *CUT_FAILS):  # such as for a model that counts its layers
        with layers.cut():
            memory = measure_memory(training, find_target_modules(training.model), batch, signals=False)
        return layers.repeated(memory, training.model, targets, step_states(training, targets, signals=False))
    return None


def work_by_layers(
    training: TrainingStep, targets: list[TargetModule], batch: Batch, ways: list[RepeatedLayers]
) -> StepWork:
    """Return a step's computation, counted with a few layers if the first cut works."""
    model, loss = training.model, training.loss
    for layers in ways[:1]:
        with suppress(RankPilotError, AttributeError, *CUT_FAILS):
            with layers.cut():
                work = count_work(model, find_target_modules(model), loss, batch)
            if whole := layers.repeated_work(work, model, targets):
                return whole
    return count_work(model, targets, loss, batch)
