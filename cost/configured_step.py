"""A training step that is known from a model's configuration, as plain data: no library that trains is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np

from ..errors import ConfigError
from ..lora.spec import ModuleSpec, highest_ranks
from .model import MemoryModel
from .recording import BatchShape
from .saver_prices import ACTIVATIONS, Saved, price_savers
from .step_time import StepWork


@dataclass(frozen=True)
class LoadedModel:
    """What is known of a model with adapters, as it is loaded for training.

    Attributes:
        kind: the name of its class.
        targets: its target modules.
        parameters: number of parameters of the frozen model, a tied one once.
        frozen: bytes of each storage of the frozen model, in the order of its modules; a shared one counts once.
        outside: those of them that lie outside of the layers which can be checkpointed, in all.
        widest: bytes of the largest such layer.
        workspace_bytes: bytes that libraries take through the allocator for as long as the process lives; 0 on the CPU.
        continues: whether it continues texts.
        positions: the most tokens of a row; None if the model sets no limit.
        windows: lengths from which attention leaves out tokens.
        keeps_state: whether its layers keep a state, so that a recording tells one length alone.
        fused: how many of the parameters are experts in one tensor, which no quantisation of a loaded model reaches.
        named: names of modules to give in place of "all-linear", where that is of others in PEFT; else empty.
        task_type: what PEFT calls the task.
        saved_modules: names of modules that train as a whole, such as a new classifier.
    """

    kind: str
    targets: tuple[ModuleSpec, ...] = field(repr=False)
    parameters: int
    frozen: tuple[int, ...] = field(repr=False)
    outside: int = 0
    widest: int = 0
    workspace_bytes: int = 0
    continues: bool = True
    positions: int | None = None
    windows: tuple[int, ...] = ()
    keeps_state: bool = False
    fused: int = 0
    named: tuple[str, ...] = ()
    task_type: str | None = None
    saved_modules: tuple[str, ...] = ()

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen model as loaded, scales of quantised weights included."""
        return sum(self.frozen)


@dataclass(frozen=True)
class ConfiguredStep:
    """A training step.

    Attributes:
        memory: predicts the bytes of any plan and batch shape beside the frozen model; `memory.cost()` is their cost.
            It has no segments if the step runs without gradient checkpointing.
        model: what is known of the model.
        work: what the step computes; None if it was not counted.
        saved: what a step of plain LoRA takes with each exact saver more, likewise.
        libraries: versions of those that recorded it, if it comes from a file.
        leaner: makes the same step with selective checkpointing; None where that saves nothing, or is not asked for.
    """

    memory: MemoryModel
    model: LoadedModel
    work: StepWork | None = field(default=None, repr=False)
    saved: tuple[Saved, ...] = ()
    leaner: Callable[[], ConfiguredStep | None] = field(default=lambda: None, repr=False)
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[ModuleSpec, ...]:
        """The target modules."""
        return self.model.targets


class StepSource(Protocol):
    """Tells what a step takes and computes: by recording it, or from a file."""

    @property
    def model(self) -> LoadedModel:
        """What is known of the model; a first step may cast some of its biases for good."""

    def memory(self, savers: tuple[str, ...], shape: BatchShape) -> MemoryModel:
        """The byte model of the step with these exact savers alone, for a batch of this shape."""

    def work(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        """What the step with these exact savers alone computes on a batch of this shape."""


def configured_step(source: StepSource, shape: BatchShape, savers: Sequence[str]) -> ConfiguredStep:
    """A step on a batch of this shape, with those of the wanted exact savers that lower its peak."""
    highest = highest_ranks(source.model.targets)
    priced = price_savers(partial(source.memory, shape=shape), savers, highest)
    work = source.work(priced.names, shape)
    found = ConfiguredStep(priced.memory, source.model, work, priced.saved if savers else ())

    def leaner() -> ConfiguredStep | None:
        names = (*priced.names, ACTIVATIONS)
        memory = source.memory(names, shape)
        saved = Saved.of(ACTIVATIONS, memory, highest)
        if not saved.is_less(priced.saved[-1]):
            return None
        return replace(found, memory=memory, saved=(*priced.saved, saved), work=source.work(names, shape))

    return replace(found, leaner=leaner) if savers and priced.memory.segments else found


Sharding = Literal["ddp", "fsdp2", "zero3"]

LIVE_PARAMETERS = 10**9
"""DeepSpeed's `stage3_max_live_parameters`."""

MOST_GPUS = 2**16


@dataclass(frozen=True)
class Shards:
    """How many GPUs train together, and what they share; every figure is of one of them, with its own batch.

    * ddp: each holds the whole frozen model, and one copy more of the adapters' gradients, in buckets.
    * fsdp2: each holds a part of the frozen model, two layers that are gathered, and all that lies outside the layers
      (embeddings, head), as `fully_shard` of each layer and of the model leaves it.
    * zero3: each holds a part of the frozen model, and up to `LIVE_PARAMETERS` that are gathered.

    Under fsdp2 and zero3 adapters, their gradients and the optimizer's state are shared too, as Trainers do it.

    Raises:
        ConfigError: there is no GPU, or one alone is to share something.
    """

    gpus: int = 1
    sharding: Sharding = "ddp"

    def __post_init__(self) -> None:
        if type(self.gpus) is not int or not 1 <= self.gpus <= MOST_GPUS:
            raise ConfigError(f"gpus is a whole number from 1 to {MOST_GPUS:,}; got {self.gpus!r}.")
        if self.sharding not in ("ddp", "fsdp2", "zero3"):
            raise ConfigError(f"sharding is ddp, fsdp2 or zero3; got {self.sharding!r}.")
        if self.gpus == 1 and self.sharding != "ddp":
            raise ConfigError(f"sharding {self.sharding} is for several GPUs: give gpus, at least 2, with it.")

    def loaded(self, model: LoadedModel) -> tuple[int, ...]:
        """Bytes of each storage of the frozen model on one GPU; the last is what is gathered."""
        if self.sharding == "ddp":
            return model.frozen
        return *(-(-size // self.gpus) for size in model.frozen), min(self._gathered(model), model.frozen_bytes)

    def _gathered(self, model: LoadedModel) -> int:
        if self.sharding == "zero3":
            return int(model.frozen_bytes * min(LIVE_PARAMETERS / model.parameters, 1.0))
        return model.outside + 2 * model.widest

    def of(self, step: ConfiguredStep) -> ConfiguredStep:
        """The step on one GPU."""
        if self.gpus == 1:
            return step
        states = step.memory.states
        if self.sharding == "ddp":
            states = states.with_buckets(1.0)
        else:
            names = ("weights", "optimizer", "fixed", "others", "other_gradients")
            states = replace(states, **{name: np.ceil(getattr(states, name) / self.gpus) for name in names})
        memory = replace(step.memory, states=states)
        return replace(step, memory=memory, model=replace(step.model, frozen=self.loaded(step.model)))
