"""Steps that were recorded before, in files that ship with the package or lie in the user's cache.

A step is recorded once for a model's configuration and the settings that a recording depends on: quantisation,
precision, attention kernels, padding, target modules. Any rank, batch, optimizer and card follows from the file,
without torch. One recording tells all lengths that run the same operators: above or below the window of attention,
and with a mask whose rows are aligned or not. A model whose layers keep a state, or whose sizes do not follow the rows,
has one for each shape of a batch.

What a file lacks is recorded and added to it. A file that is damaged, or was written by another version of this
package, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.files import atomic_path
from ..errors import DataError, UnsupportedError
from ..lora.spec import ModuleSpec
from .configured_step import ConfiguredStep, LoadedAs, LoadedModel, StepSource, configured_step
from .model import MemoryModel, ModelStates
from .of_targets import OfTargets
from .recording import BatchShape
from .saver_prices import COPIES, ROUTED, free_savers
from .step_config import MOST_TOKENS, OptimizerName, StepConfig
from .step_file import (
    Json,
    Part,
    Step,
    memory_arrays,
    names_alike,
    names_told,
    packed,
    read_memory,
    read_states,
    read_work,
    states_arrays,
    unpacked,
    work_arrays,
)
from .step_time import StepWork
from .work_growth import MASK_ALIGNMENT, WorkGrowth, counted_shapes

SCHEMA = 3
"""The version of the files."""

USUAL = BatchShape(4, 2080)
"""The batch that is recorded for all, where nothing is in the way."""

ALIGNED, UNALIGNED = (32, 256), (4, 512)
"""The rest of a recorded length, and of what multiple, where the rows of a mask are aligned and where they are not.

So is a half of it. Neither has the share in a multiple of 8, 16, ... 128 that the other has, so that it is seen to
what multiples a kernel rounds lengths; those up to 16 are of masks alone, and do nothing where rows are aligned.
"""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""What a recording depends on, beside this package."""


class Recorder(StepSource, Protocol):
    """Records a step; see `StepRecorder`."""

    def states(self, optimizer: OptimizerName) -> ModelStates:
        """What the adapters and this optimizer hold between steps."""


@cache
def versions() -> dict[str, str]:
    """The installed versions of `LIBRARIES`, absent ones left out, and a check sum of the code that records."""
    from importlib.metadata import PackageNotFoundError, version  # which takes a while, and what ships does not ask

    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    code = hashlib.sha256()
    for room in ("cost", "lora"):
        for path in sorted((Path(__file__).parent.parent / room).glob("*.py")):
            code.update(path.read_bytes())
    return {**found, "code": code.hexdigest()[:16]}


def step_key(configuration: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The key of a step: a hash of a model's configuration and of the settings that a recording depends on."""
    said = {name: value for name, value in configuration.items() if name not in _OF_NO_MATTER}
    text = json.dumps([SCHEMA, said, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_OF_NO_MATTER = ("_name_or_path", "name_or_path", "transformers_version")


class StepFile:
    """What is known of a step, in parts: the model, byte models, work, what optimizers hold.

    Args:
        key: of the step; see `step_key`.
        content: what a file holds; None for nothing yet.

    Attributes:
        key: of the step.
        text: the version of the schema, versions of libraries, and from which of `StoredStep`'s shapes on recordings
            tell of batches.
        parts: arrays and a text of each, by name.
    """

    key: str
    text: Json
    parts: dict[str, Part]

    def __init__(self, key: str, content: Step | None = None) -> None:
        self.key = key
        self.text, self.parts = content or ({"schema": SCHEMA, "level": 0, "versions": versions()}, {})

    @classmethod
    def read(cls, path: Path, key: str) -> StepFile | None:
        """Read a step from a file; None if there is none that is whole, and of this schema."""
        try:
            found = cls(key, unpacked(path.read_bytes(), (key,))[key])
            whole = found.text["schema"] == SCHEMA and "model" in found.parts
        except (OSError, DataError, LookupError, TypeError):
            return None
        return found if whole else None

    def write(self, path: Path) -> None:
        """Write it in one step, alone in its file."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(packed({self.key: (self.text, self.parts)}, small=False))


class StoredStep:
    """A step that is read from a file as far as it is there, and else recorded; see `StepSource`.

    Args:
        file: what is known; what is recorded is added.
        recorder: makes what records it.
        path: where the file is kept once something was added, if it can be; None for nowhere.
        loaded: how the model is loaded.

    Attributes:
        file: what is known now.
    """

    file: StepFile

    def __init__(
        self, file: StepFile, recorder: Callable[[], Recorder], path: Path | None, loaded: LoadedAs | None = None
    ) -> None:
        self.file, self._recorder, self._path = file, cache(recorder), path
        self._targets: OfTargets | None = None
        self._loaded = loaded or LoadedAs()
        self._step, self._changed = StepConfig(), False

    def of(self, targets: OfTargets) -> StoredStep:
        """The same step, in which some of the modules alone have an adapter."""
        found = copy(self)
        found._targets = targets
        return found

    def configured(self, step: StepConfig) -> ConfiguredStep:
        """The step of these settings, whose batch has a size."""
        self._step = step
        shape = BatchShape(step.batch_size, step.max_length)
        found = configured_step(self, shape, free_savers(self.model.targets) if step.exact_savers else ())
        self._keep()
        libraries = {name: number for name, number in self.file.text["versions"].items() if name in LIBRARIES}

        def leaner() -> ConfiguredStep | None:
            lean = found.leaner()
            self._keep()
            return lean and replace(lean, libraries=libraries)

        return replace(found, leaner=leaner, libraries=libraries)

    def _keep(self) -> None:
        if self._changed and self._path:
            with suppress(OSError):
                self.file.write(self._path)
        self._changed = False

    @property
    def loaded(self) -> LoadedAs:
        """How the model is loaded."""
        return self._loaded

    @property
    def model(self) -> LoadedModel:
        """What is known of the model."""
        return self._targets.model(self._recorded) if self._targets else self._recorded

    @property
    def _recorded(self) -> LoadedModel:
        part = self.file.parts.get("model")
        return _read_model(*part) if part else self._recorder().model

    def memory(self, savers: tuple[str, ...], shape: BatchShape) -> MemoryModel:
        """The byte model of the step with these exact savers alone, for batches of this shape.

        Raises:
            UnsupportedError: see `from_config`.
        """
        states, savers = self.states(self._step.optimizer), self._recorded_with(savers)
        for level, known in enumerate(self._shapes(shape)):
            if level < self.file.text["level"]:
                continue
            with nullcontext() if known == shape else suppress(UnsupportedError):
                memory = self._memory(savers, known, states)
                if memory.predicts(shape):
                    memory = replace(memory, shape=shape, accumulates=self._step.accumulation > 1)
                    return memory.offloaded() if self._loaded.offload else memory
            self.file.text["level"] = level + 1
        raise AssertionError("a recorded batch tells of itself")

    def work(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        """What the step with these exact savers alone computes on a batch of this shape."""
        work = self._work_at(self._recorded_with(savers), shape)
        return self._targets.work(work) if self._targets else work

    def _work_at(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        usual = self._shapes(shape)[0]
        if self.file.text["level"] == 0 and not self.model.keeps_state:
            if work := self._work(savers, counted_shapes(usual)):
                return work.at(shape)
            self.file.text["level"] = 1
        work = self._work(savers, (shape,))
        assert work is not None, "a single count is like itself"
        return work.work

    def _shapes(self, shape: BatchShape) -> tuple[BatchShape, ...]:
        """The batches whose recordings may tell of a batch, those first that tell of most."""
        model, rows = self.model, USUAL.rows
        same_length = BatchShape(rows if shape.rows > 1 else 1, shape.length)
        below = max((window for window in model.windows if window <= shape.length), default=0)
        masked = below and not (self._loaded.padded or model.is_eager)
        rest, multiple = UNALIGNED if masked and shape.length % MASK_ALIGNMENT else ALIGNED
        ends = [*model.windows, *([] if model.positions is None else [model.positions + 1])]
        most = min((end - 1 for end in ends if end > shape.length), default=MOST_TOKENS)
        length = max(USUAL.length, 2 * below)
        length += (rest - length) % multiple
        if length > most:
            length = most - (most - rest) % multiple
        usual = BatchShape(rows, length if length >= max(2 * below, rest) else shape.length)
        return same_length if model.keeps_state else usual, same_length, shape

    def _memory(self, savers: tuple[str, ...], known: BatchShape, states: ModelStates) -> MemoryModel:
        name = f"memory {known} {_named(savers)}"
        if part := self.file.parts.get(name):
            memory = read_memory(*part, states, known)
        else:
            memory = replace(self._recorder().memory(savers, known), states=states)
            self._add(name, memory_arrays(memory))
            self._add("model", _model_arrays(self._recorder().model))  # as it is after a step
        return self._targets.memory(memory) if self._targets else memory

    def _work(self, savers: tuple[str, ...], shapes: tuple[BatchShape, ...]) -> WorkGrowth | None:
        name = f"work {shapes[0]} {_named(savers)}"
        if part := self.file.parts.get(name):
            return read_work(*part, np.array([target.d_in + target.d_out for target in self._recorded.targets]))
        work = WorkGrowth.of(shapes, [self._recorder().work(savers, shape) for shape in shapes])
        if work:
            self._add(name, work_arrays(work))
        return work

    def states(self, optimizer: OptimizerName) -> ModelStates:
        """What the adapters and this optimizer hold between steps."""
        name = f"states {optimizer}"
        if part := self.file.parts.get(name):
            states = read_states(*part)
        else:
            states = self._recorder().states(optimizer)
            self._add(name, states_arrays(states))
        return self._targets.states(states) if self._targets else states

    def _recorded_with(self, savers: tuple[str, ...]) -> tuple[str, ...]:
        """Savers of the recorded step: where no modules share an input, to share copies of it does nothing."""
        if self._targets and savers and COPIES not in savers:
            return *(name for name in savers if name == ROUTED), COPIES, *(name for name in savers if name != ROUTED)
        return savers

    def _add(self, name: str, part: Part) -> None:
        if self.file.text["versions"] != versions():  # it shipped, and does not mix with what is recorded now
            self.file = StepFile(self.file.key)
        self.file.parts[name] = part
        self._changed = True


def _named(savers: tuple[str, ...]) -> str:
    return ", ".join(savers) or "plain"


def _model_arrays(model: LoadedModel) -> Part:
    text = {name: value for name, value in asdict(model).items() if name not in ("targets", "frozen")}
    text["targets"] = names_alike([target.name for target in model.targets])
    widths = [(target.block, target.d_in, target.d_out) for target in model.targets]
    experts = np.array([target.experts for target in model.targets])
    arrays = {"widths": np.array(widths), "frozen": np.array(model.frozen)}
    return arrays | ({"experts": experts} if (experts > 1).any() else {}), text


def _read_model(arrays: Mapping[str, Any], text: Json) -> LoadedModel:
    rows = zip(names_told(text["targets"]), arrays["widths"].tolist(), strict=True)
    experts = arrays.get("experts", np.ones(len(text["targets"]), dtype=np.int64)).tolist()
    targets = tuple(ModuleSpec(name, *row, experts=count) for (name, row), count in zip(rows, experts, strict=True))
    read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in text.items()}
    return LoadedModel(**read | {"targets": targets, "frozen": tuple(arrays["frozen"].tolist())})
