"""Recorded steps, stored in files that ship with the package or lie in the user's cache.

A step is recorded once per model configuration and settings that affect a recording: quantisation, precision, attention
kernels, padding, target modules. Any rank, batch, optimizer and card follows from the file, without torch. One
recording covers all lengths that run the same operators: above or below the attention window, and with mask rows
aligned or not. Models whose layers keep a state, or whose sizes do not follow the rows, need one per batch shape.

Missing parts are recorded and added to the file. A damaged file, or one written by another version of this package,
counts as absent.
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

from ...common.errors import DataError, UnsupportedError
from ...common.files import atomic_path
from ...lora.spec import ModuleSpec
from ..model import MemoryModel, ModelStates
from ..recording import BatchShape
from ..savers.prices import COPIES, ROUTED, free_savers
from ..step_config import MOST_TOKENS, OptimizerName, StepConfig
from ..step_time import MASK_ALIGNMENT, StepWork, WorkGrowth, counted_shapes
from .configured_step import ConfiguredStep, LoadedAs, LoadedModel, StepSource, configured_step
from .of_targets import OfTargets
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

SCHEMA = 3
"""Version of the file format."""

USUAL = BatchShape(4, 2080)
"""Batch shape recorded by default."""

ALIGNED, UNALIGNED = (32, 256), (4, 512)
"""Remainder and modulus of recorded lengths, for aligned and unaligned mask rows.

Half the length matches too. The two lengths have different remainders modulo 8, 16, ... 128, which reveals the
multiples to which kernels round lengths; multiples up to 16 only occur with masks, and have no effect on aligned rows.
"""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries with an effect on a recording, in addition to this package."""


class Recorder(StepSource, Protocol):
    """Records a step; see `StepRecorder`."""

    def states(self, optimizer: OptimizerName) -> ModelStates:
        """Return the state held by the adapters and this optimizer between steps."""


@cache
def versions() -> dict[str, str]:
    """Return the versions of installed `LIBRARIES`, and a checksum of the recording code."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and not needed for shipped files

    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    code = hashlib.sha256()
    for room in ("cost", "lora"):
        for path in sorted((Path(__file__).parents[2] / room).rglob("*.py")):
            code.update(path.read_bytes())
    return {**found, "code": code.hexdigest()[:16]}


def step_key(configuration: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the key of a step: a hash of the model configuration and the settings that affect a recording."""
    said = {name: value for name, value in configuration.items() if name not in _OF_NO_MATTER}
    text = json.dumps([SCHEMA, said, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_OF_NO_MATTER = ("_name_or_path", "name_or_path", "transformers_version")


class StepFile:
    """The known parts of a step: the model, byte models, work, optimizer states.

    Args:
        key: key of the step; see `step_key`.
        content: contents of a file; None for an empty step.

    Attributes:
        key: key of the step.
        text: schema version, library versions, and the index of the first of `StoredStep`'s shapes whose recordings
            cover other batches.
        parts: arrays and text of each part, by name.
    """

    key: str
    text: Json
    parts: dict[str, Part]

    def __init__(self, key: str, content: Step | None = None) -> None:
        self.key = key
        self.text, self.parts = content or ({"schema": SCHEMA, "level": 0, "versions": versions()}, {})

    @classmethod
    def read(cls, path: Path, key: str) -> StepFile | None:
        """Read a step from a file; None if there is no complete one of this schema."""
        try:
            found = cls(key, unpacked(path.read_bytes(), (key,))[key])
            whole = found.text["schema"] == SCHEMA and "model" in found.parts
        except (OSError, DataError, LookupError, TypeError):
            return None
        return found if whole else None

    def write(self, path: Path) -> None:
        """Write the step atomically, as the only one in its file."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(packed({self.key: (self.text, self.parts)}, small=False))


class StoredStep:
    """A step read from a file where possible, and recorded otherwise; see `StepSource`.

    Args:
        file: the known parts; newly recorded ones are added.
        recorder: creates the recorder.
        path: file to update after additions, if writable; None for none.
        loaded: how the model is loaded.

    Attributes:
        file: the parts known so far.
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
        """Return the same step with adapters on only some of the modules."""
        found = copy(self)
        found._targets = targets
        return found

    def configured(self, step: StepConfig) -> ConfiguredStep:
        """Return the step with these settings, whose batch size must be set."""
        self._step = step
        shape = BatchShape(step.batch_size, step.max_length)
        found = configured_step(self, shape, free_savers(self.model.targets) if step.exact_savers else ())
        self._keep()
        libraries = {name: number for name, number in self.file.text["versions"].items() if name in LIBRARIES}

        def leaner() -> ConfiguredStep | None:
            lean = found.leaner()
            self._keep()
            return lean and replace(lean, libraries=libraries)

        def measure(savers: tuple[str, ...]) -> MemoryModel:
            memory = self.memory(savers, shape)
            self._keep()
            return memory

        return replace(found, leaner=leaner, libraries=libraries, measure=measure)

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
        """The model."""
        return self._targets.model(self._recorded) if self._targets else self._recorded

    @property
    def _recorded(self) -> LoadedModel:
        part = self.file.parts.get("model")
        return _read_model(*part) if part else self._recorder().model

    def memory(self, savers: tuple[str, ...], shape: BatchShape) -> MemoryModel:
        """Return the byte model of the step with exactly these savers, for batches of this shape.

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
        """Return the computation of a step with exactly these savers on a batch of this shape."""
        work = self._work_at(self._recorded_with(savers), shape)
        return self._targets.work(work) if self._targets else work

    def _work_at(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        usual = self._shapes(shape)[0]
        if self.file.text["level"] == 0 and not (self.model.keeps_state or self._loaded.image):
            if work := self._work(savers, counted_shapes(usual)):
                return work.at(shape)
            self.file.text["level"] = 1
        work = self._work(savers, (shape,))
        assert work is not None, "a single count is like itself"
        return work.work

    def _shapes(self, shape: BatchShape) -> tuple[BatchShape, ...]:
        """Return batch shapes whose recordings may cover a batch, the most general first."""
        if self._loaded.image:
            return (shape,)
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
        """Return the state held by the adapters and this optimizer between steps."""
        name = f"states {optimizer}"
        if part := self.file.parts.get(name):
            states = read_states(*part)
        else:
            states = self._recorder().states(optimizer)
            self._add(name, states_arrays(states))
        return self._targets.states(states) if self._targets else states

    def _recorded_with(self, savers: tuple[str, ...]) -> tuple[str, ...]:
        """Return the savers of the recorded step: sharing input copies has no effect unless modules share an input."""
        if self._targets and savers and COPIES not in savers:
            return *(name for name in savers if name == ROUTED), COPIES, *(name for name in savers if name != ROUTED)
        return savers

    def _add(self, name: str, part: Part) -> None:
        if self.file.text["versions"] != versions():  # a shipped file must not mix with new recordings
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
