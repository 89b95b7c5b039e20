"""A step in which some target modules have an adapter, from the recording of one in which all do.

A recording tells for which modules each tensor is held, and to which adapter each operator belongs. So a step with
fewer adapters needs no recording of its own: what belongs to the others is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from ..common.arrays import BoolArray, IntArray
from ..lora.spec import ModuleSpec, absent, is_pattern
from .configured_step import LoadedModel
from .cost import ModuleSet
from .model import MemoryModel, ModelStates, reasons_to_hold
from .recording import Phases, Recording
from .step_time import StepWork


def places_of(target_modules: str, targets: Sequence[ModuleSpec]) -> IntArray | None:
    """The places of target modules among others, int64 (modules,); None where names are of none, or an expression.

    Args:
        target_modules: names between commas, as `peft.LoraConfig` takes them.
        targets: among which they are looked for.
    """
    names = [name.strip() for name in target_modules.split(",")]
    paths = [target.name for target in targets]
    if is_pattern(target_modules) or absent(names, paths):
        return None
    return np.array([place for place, path in enumerate(paths) if not set(names) <= {*absent(names, [path])}])


class OfTargets:
    """Takes what belongs to some modules out of a step in which all are adapted.

    Args:
        places: of these modules among all, int64 (modules,).
        count: of all modules.
    """

    def __init__(self, places: IntArray, count: int) -> None:
        self._places, self._count = places, count
        self._numbers = np.full(count + 1, -1)  # the last is that of no module
        self._numbers[places] = np.arange(len(places))
        self._known: dict[ModuleSet, ModuleSet] = {}

    def model(self, model: LoadedModel) -> LoadedModel:
        """The model with adapters on them."""
        return replace(model, targets=tuple(model.targets[place] for place in self._places), named=())

    def states(self, states: ModelStates) -> ModelStates:
        """What their adapters and an optimizer hold."""
        found = {each.name: getattr(states, each.name) for each in fields(states)}
        own = {name: value[self._places] for name, value in found.items() if np.size(value) == self._count > 1}
        return replace(states, **own)

    def memory(self, memory: MemoryModel) -> MemoryModel:
        """The byte model, whose states are those of these modules already."""
        recording, gradients = memory.recording, memory.recording.gradients.items()
        left = (recording.target_index >= 0) & (self._numbers[recording.target_index] < 0)
        kept = {serial: int(self._numbers[module]) for serial, module in gradients}
        left[[serial for serial, module in gradients if module >= 0 > kept[serial]]] = True
        served = [s for sets in reasons_to_hold(recording) for s, modules in sets.items() if self._set(modules)]
        of_adapter = left & ~_within(".base_layer", recording)
        of_adapter[served] = False  # such as a copy of its input that others share
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
        """What the step computes."""
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
        never = 1 << len(self._places) + 1  # a set that none of the modules is in; the empty one would count always
        return {serial: self._set(modules) or bool(modules) * never for serial, modules in sets.items()}

    def _phases(self, phases: Phases) -> Phases:
        return tuple((time, self._sets({0: modules})[0]) for time, modules in phases)

    def _set(self, modules: ModuleSet) -> ModuleSet:
        """Those of these modules that are in a set, by their own places, and what always trains."""
        if modules not in self._known:
            bits = (*self._places.tolist(), self._count)
            self._known[modules] = sum(1 << own for own, place in enumerate(bits) if modules >> place & 1)
        return self._known[modules]


def _within(part: str, recording: Recording) -> BoolArray:
    """Whether each storage is made in a module whose name has a part, bool (storages,)."""
    found: BoolArray = np.array([part in name for name in recording.names])[recording.name_index]
    return found
