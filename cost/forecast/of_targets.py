"""Derive a step with adapters on a subset of modules from the recording of one with all modules adapted.

A recording lists the modules that hold each tensor and the adapter each operator belongs to. A step with fewer adapters
therefore needs no recording of its own: everything that belongs to other adapters is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from ...common.arrays import BoolArray, IntArray
from ...lora.spec import ModuleSpec, absent, is_pattern
from ..cost import ModuleSet
from ..model import MemoryModel, ModelStates, reasons_to_hold
from ..recording import Phases, Recording
from ..step_time import StepWork
from .configured_step import LoadedModel


def places_of(target_modules: str, targets: Sequence[ModuleSpec]) -> IntArray | None:
    """Return the indices of named target modules, int64 (modules,); None for unknown names or an expression.

    Args:
        target_modules: comma-separated names, as in `peft.LoraConfig`.
        targets: modules to search.
    """
    names = [name.strip() for name in target_modules.split(",")]
    paths = [target.name for target in targets]
    if is_pattern(target_modules) or absent(names, paths):
        return None
    return np.array([place for place, path in enumerate(paths) if not set(names) <= {*absent(names, [path])}])


class OfTargets:
    """Restricts a step with all modules adapted to a subset of them.

    Args:
        places: indices of the subset among all modules, int64 (modules,).
        count: total number of modules.
    """

    def __init__(self, places: IntArray, count: int) -> None:
        self._places, self._count = places, count
        self._numbers = np.full(count + 1, -1)  # the last entry is for no module
        self._numbers[places] = np.arange(len(places))
        self._known: dict[ModuleSet, ModuleSet] = {}

    def model(self, model: LoadedModel) -> LoadedModel:
        """Return the model with adapters on the subset."""
        return replace(model, targets=tuple(model.targets[place] for place in self._places), named=())

    def states(self, states: ModelStates) -> ModelStates:
        """Return the state held by the subset's adapters and an optimizer."""
        found = {each.name: getattr(states, each.name) for each in fields(states)}
        own = {name: value[self._places] for name, value in found.items() if np.size(value) == self._count > 1}
        return replace(states, **own)

    def memory(self, memory: MemoryModel) -> MemoryModel:
        """Return the byte model; its states already cover only the subset."""
        recording, gradients = memory.recording, memory.recording.gradients.items()
        left = (recording.target_index >= 0) & (self._numbers[recording.target_index] < 0)
        kept = {serial: int(self._numbers[module]) for serial, module in gradients}
        left[[serial for serial, module in gradients if module >= 0 > kept[serial]]] = True
        served = [s for sets in reasons_to_hold(recording) for s, modules in sets.items() if self._set(modules)]
        of_adapter = left & ~_within(".base_layer", recording)
        of_adapter[served] = False  # such as a shared copy of its input
        of_adapter |= left & _within(".lora_", recording)
        found = replace(
            recording,
            target_index=self._numbers[recording.target_index],
            needed=self._sets(recording.needed),
            needed_later={serial: self._phases(phases) for serial, phases in recording.needed_later.items()},
            gradients={serial: kept[serial] for serial, module in gradients if module < 0 or kept[serial] >= 0},
            segments=tuple(replace(each, saved=self._sets(each.saved)) for each in recording.segments),
        )
        base = np.where(of_adapter, 0.0, memory._base)
        return replace(memory, recording=found, _base=base, _slope=np.where(left, 0.0, memory._slope))

    def work(self, work: StepWork) -> StepWork:
        """Return the computation of the step."""
        kept = (work.module < 0) | (self._numbers[work.module] >= 0)
        arrays = {name: getattr(work, name)[kept] for name in ("flops", "moved", "backward", "layer")}
        return replace(
            work,
            **arrays,
            module=self._numbers[work.module[kept]],
            needed=tuple(self._set(work.needed[place]) for place in np.flatnonzero(kept)),
            widths=work.widths[self._places],
        )

    def _sets(self, sets: Mapping[int, ModuleSet]) -> dict[int, ModuleSet]:
        never = 1 << len(self._places) + 1  # a set without any of the modules; the empty one would always count
        return {serial: self._set(modules) or bool(modules) * never for serial, modules in sets.items()}

    def _phases(self, phases: Phases) -> Phases:
        return tuple((time, self._sets({0: modules})[0]) for time, modules in phases)

    def _set(self, modules: ModuleSet) -> ModuleSet:
        """Return the members of a set within the subset, renumbered, and what always trains."""
        if modules not in self._known:
            bits = (*self._places.tolist(), self._count)
            self._known[modules] = sum(1 << own for own, place in enumerate(bits) if modules >> place & 1)
        return self._known[modules]


def _within(part: str, recording: Recording) -> BoolArray:
    """Return the storages created in a module with `part` in its name, bool (storages,)."""
    found: BoolArray = np.array([part in name for name in recording.names])[recording.name_index]
    return found
