"""Weights that a card gathers from all others while a layer runs, under FSDP2.

Each unit of `fully_shard` (the embeddings, each layer, the head) is gathered into a flat buffer, and copied from there
to its parameters. The flat buffer stays until the next unit is gathered. The backward pass gathers one layer ahead.
Source: torch/distributed/fsdp/_fully_shard of PyTorch 2.13, with the units of accelerate 1.15 (`fsdp2_prepare_model`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ..common.arrays import FloatArray, IntArray
from .cost import ModuleSet
from .growth import OF_STORAGES
from .model import MemoryModel
from .recording import Recording, Segment, adapted_modules


@dataclass(frozen=True)
class GatheredUnits:
    """The frozen bytes of the units that a card gathers.

    Attributes:
        embeddings: bytes of the input embeddings.
        head: bytes of the output embeddings; 0 if they are tied to the input's, which then stay for the whole step.
        layer: bytes of the largest layer.
        rest: bytes of all else, which stays for the whole step.
    """

    embeddings: int
    head: int
    layer: int
    rest: int


class _Gather(NamedTuple):
    """A storage: when it is created and freed, its bytes, and those per rank of a target module (-1: none)."""

    created: int
    freed: int
    size: float
    slope: float = 0.0
    target: int = -1
    needed: ModuleSet | None = None
    name: int = -1


@dataclass(frozen=True)
class _Layer:
    """A layer: the span of its forward pass, of its backward pass, its target modules, and the index of its name.

    The backward pass runs if any of the modules in `reached_by` is adapted.
    """

    start: int
    end: int
    begins: int
    ends: int
    targets: IntArray
    reached_by: ModuleSet
    name: int


def with_gathers(memory: MemoryModel, units: GatheredUnits, cards: int) -> MemoryModel:
    """Return the byte model of a step on one of `cards` cards that gathers these units and shares out gradients.

    Args:
        memory: the step on one card, with all layers checkpointed; without any, all that is gathered stays throughout.
        units: what is gathered.
        cards: number of cards.
    """
    gathers = sorted(_gathers(memory.recording, units, memory.states.weights), key=lambda each: each.created)
    # Under accumulation whole gradients stay until the last batch of a step (`no_sync`).
    return _inserted(memory if memory.accumulates else with_shared_gradients(memory, cards), gathers)


def with_shared_gradients(memory: MemoryModel, cards: int) -> MemoryModel:
    """Return the byte model of a step on one of `cards` cards, which keeps its share of each gradient."""
    shares = np.ones(len(memory.recording.sizes))
    shares[[*memory.recording.gradients]] = cards
    return replace(memory, _base=np.ceil(memory._base / shares), _slope=memory._slope / shares)


def _gathers(recording: Recording, units: GatheredUnits, weights: FloatArray) -> Iterator[_Gather]:
    layers, end = list(_layers(recording, len(weights))), int(recording.created.max())
    if not layers:
        yield _Gather(0, end, units.embeddings + units.head + units.rest + 2 * units.layer)
        return
    first, last, forward_end = layers[0], layers[-1], recording.forward_end
    yield _Gather(0, end, units.rest)
    yield _Gather(0, first.start, units.embeddings)
    yield _Gather(0, first.start - 1 if units.head else end, units.embeddings)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        until = following.start if following else last.end if units.head else forward_end
        yield _Gather(layer.start, until, units.layer, name=layer.name)
        ends = min(layer.end, until - 1)
        yield _Gather(layer.start, ends, units.layer, name=layer.name)
        for target in layer.targets.tolist():
            yield _Gather(layer.start, until, 0.0, weights[target], target, name=layer.name)
            yield _Gather(layer.start, ends, 0.0, weights[target], target, name=layer.name)
    if units.head:
        yield _Gather(last.end, forward_end, units.head)
        yield _Gather(last.end, last.begins, units.head)
    ahead = _Gather(last.begins, last.begins, units.layer, needed=last.reached_by, name=last.name)
    for layer, below in zip(layers[::-1], [*layers[-2::-1], None], strict=True):
        yield ahead
        ends = min(layer.ends, below.begins - 1) if below else end
        yield _Gather(layer.begins, ends, units.layer, needed=layer.reached_by, name=layer.name)
        size, until = (units.layer, below.begins) if below else (units.embeddings * (units.head > 0), end)
        ahead = _Gather(layer.begins + 1, until, size, needed=layer.reached_by, name=layer.name)
        for target in layer.targets.tolist():  # weights twice, and gradients on their way
            yield _Gather(layer.begins, ends, 0.0, 3 * weights[target], target, layer.reached_by, name=layer.name)
    yield ahead


def _layers(recording: Recording, modules: int) -> Iterator[_Layer]:
    """Yield the checkpointed layers, in forward order; all have target modules, so gradients reach each."""
    backward, below, after = recording.created > recording.forward_end, np.zeros(modules, dtype=np.bool_), 0
    for name in recording.layers:
        own = [index for index, segment in enumerate(recording.segments) if segment.name == name]
        within = np.isin(recording.segment_index, own)
        times = recording.created[within & backward]
        if not len(times):
            continue
        targets = np.unique(recording.target_index[within & (recording.target_index >= 0)])
        below[targets] = True
        start = max(min(recording.segments[index].start for index in own), after)
        after = max(*(recording.segments[index].end for index in own), start)
        reached = adapted_modules(below) & ~(1 << modules)
        begins = int(times.min()) - 1
        yield _Layer(start, after, begins, int(times.max()), targets, reached, recording.names.index(name))


def _inserted(memory: MemoryModel, gathers: list[_Gather]) -> MemoryModel:
    """Return the model with more storages, which neither rows nor length change, before others of the same time."""
    recording, growth, count = memory.recording, memory._growth, len(gathers)
    created, freed = np.array([(each.created, max(each.created, each.freed)) for each in gathers], dtype=np.int64).T
    size, slope = np.array([(each.size, each.slope) for each in gathers]).T
    order = np.argsort(np.concatenate([created, recording.created]), kind="stable")
    place = np.argsort(order)
    serials, moved_to = place[:count].tolist(), place[count:]

    def merged(ours: Any, theirs: Any) -> Any:
        return np.concatenate([np.broadcast_to(np.asarray(ours, dtype=theirs.dtype), count), theirs])[order]

    def moved(by_serial: Mapping[int, Any]) -> dict[int, Any]:
        return {int(moved_to[serial]): value for serial, value in by_serial.items()}

    def segment(each: Segment) -> Segment:
        inputs, outputs = (tuple(moved_to[list(numbers)].tolist()) for numbers in (each.inputs, each.outputs))
        return replace(each, inputs=inputs, outputs=outputs, saved=moved(each.saved))

    ours = {
        "sizes": np.ceil(size),
        "created": created,
        "freed": freed,
        "freed_if_unsaved": freed,
        "name_index": [each.name for each in gathers],
        "target_index": [each.target for each in gathers],
        "segment_index": -1,
        "uses_saved": False,
    }
    # By the kind of each field, so that none can be forgotten: values of storages, or a dictionary by serial number.
    all_fields = {each.name: getattr(recording, each.name) for each in fields(recording)}
    changed: dict[str, Any] = {
        name: merged(ours[name], each) for name, each in all_fields.items() if isinstance(each, np.ndarray)
    }
    changed |= {name: moved(each) for name, each in all_fields.items() if isinstance(each, dict)}
    changed["needed"] |= {
        serial: each.needed for serial, each in zip(serials, gathers, strict=True) if each.needed is not None
    }
    changed |= {"segments": tuple(map(segment, recording.segments)), "gathers": tuple(serials)}
    grown = {name: merged(name == "multiple", getattr(growth, name)) for name in OF_STORAGES}
    return replace(
        memory,
        recording=replace(recording, **changed),
        _base=merged(size, memory._base),
        _slope=merged(slope, memory._slope),
        _growth=replace(growth, **grown),
    )
