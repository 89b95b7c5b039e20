"""A training step that is known from a model's configuration, as plain data: no library that trains is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ..errors import ConfigError, shown
from ..lora.spec import ModuleSpec, highest_ranks
from .model import MemoryModel
from .recording import BatchShape
from .saver_prices import ACTIVATIONS, Saved, price_savers
from .step_config import Attention, ExpertBits
from .step_time import StepWork

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Precisions in which a frozen model can be loaded, and what torch calls them."""

Implementation = Literal["eager", "sdpa", "flash", "flex"]
"""Of attention: operators one by one, torch's function, or a kernel that never makes scores and reads no mask."""

LossKind = Literal["model", "chunked", "cut"]
"""What computes the loss: model, transformers or the exact savers; chunked, TRL's SFTTrainer, in tiles of the
vocabulary; cut, cut cross-entropy (arXiv:2411.09009), or another kernel that holds no logits at all."""


@dataclass(frozen=True, kw_only=True)
class LoadedAs:
    """How the model would be loaded and trained, beside what `StepConfig` says.

    Attributes:
        device: "cuda" or "cpu".
        dtype: the precision of the frozen weights, a torch dtype or a name in `DTYPES`; by default that of the
            configuration. Adapters are then in fp32, as
            PEFT makes them.
        attention: which attention kernels CUDA has, if the configuration does not ask for eager attention.
        padded: whether some rows of a batch are padded, which takes other kernels and a mask.
        double_quantization: whether the scales of nf4 weights are quantised too.
        reentrant: whether gradient checkpointing is torch's reentrant one.
        input_gradients: whether the embedding's output is made to require gradients (`enable_input_require_grads`).
        keeps_output: whether the training loop keeps the model's output, logits included, until the step ends; the
            Trainer does not.
        adapter: further arguments of `peft.LoraConfig`, such as use_dora.
        experts: how fused experts of a quantised model are kept.
        implementation: of attention in transformers; by default that of the configuration.
        loss: what computes the loss of a causal language model.
        fused_activations: whether activation functions that transformers composes of many operators run as the CUDA
            kernels that their authors publish (xIELU of Apertus).
        packed: whether a row holds several texts, so that it may be longer than the model has positions.
        offload: whether inputs of checkpointed layers lie in main memory until they run again.
        expandable_segments: whether torch's allocator has them.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Any = None
    attention: Attention = "auto"
    padded: bool = False
    double_quantization: bool = True
    reentrant: bool = False
    input_gradients: bool = False
    keeps_output: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)
    experts: ExpertBits = "transformers"
    implementation: Implementation | None = None
    loss: LossKind = "model"
    fused_activations: bool = True
    packed: bool = False
    offload: bool = False
    expandable_segments: bool = False


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
        products: the weights of its products, and the width of its hidden states.
        precision: what torch calls that of its first parameter.
        continues: whether it continues texts.
        positions: the most tokens of a row; None if the model sets no limit.
        windows: lengths from which attention leaves out tokens.
        keeps_state: whether its layers keep a state, so that a recording tells one length alone.
        fused: how many of the parameters are experts in one tensor, which no quantisation of a loaded model reaches.
        named: names of modules to give in place of "all-linear", where that is of others in PEFT; else empty.
        is_eager: whether attention holds the scores of all pairs of tokens.
        has_xielu: whether it has the activation function xIELU.
        words: of its vocabulary, as its configuration tells; 0 if it does not.
        own_code: whether that names code that comes with the weights; what is priced is that of transformers.
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
    products: tuple[int, int] = (0, 0)
    precision: str = "float32"
    continues: bool = True
    positions: int | None = None
    windows: tuple[int, ...] = ()
    keeps_state: bool = False
    fused: int = 0
    named: tuple[str, ...] = ()
    is_eager: bool = False
    has_xielu: bool = False
    words: int = 0
    own_code: bool = False
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
        loaded: how the model is loaded and trained.
        libraries: versions of those that recorded it, if it comes from a file.
        leaner: makes the same step with selective checkpointing; None where that saves nothing, or is not asked for.
    """

    memory: MemoryModel
    model: LoadedModel
    work: StepWork | None = field(default=None, repr=False)
    saved: tuple[Saved, ...] = ()
    leaner: Callable[[], ConfiguredStep | None] = field(default=lambda: None, repr=False)
    loaded: LoadedAs = field(default_factory=LoadedAs, repr=False)
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[ModuleSpec, ...]:
        """The target modules."""
        return self.model.targets


class StepSource(Protocol):
    """Tells what a step takes and computes: by recording it, or from a file."""

    @property
    def loaded(self) -> LoadedAs:
        """How the model is loaded."""

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
    found = ConfiguredStep(priced.memory, source.model, work, priced.saved if savers else (), loaded=source.loaded)

    def leaner() -> ConfiguredStep | None:
        names = (*priced.names, ACTIVATIONS)
        memory = source.memory(names, shape)
        saved = Saved.of(ACTIVATIONS, memory, highest)
        if not saved.is_less(priced.saved[-1]):
            return None
        return replace(found, memory=memory, saved=(*priced.saved, saved), work=source.work(names, shape))

    return replace(found, leaner=leaner) if savers and priced.memory.segments else found


Sharding = Literal["ddp", "zero2", "fsdp2", "zero3"]

LIVE_PARAMETERS = 10**9
"""DeepSpeed's `stage3_max_live_parameters`."""

MOST_GPUS = 2**16


@dataclass(frozen=True)
class Shards:
    """How many GPUs train together, and what they share; every figure is of one of them, with its own batch.

    * ddp: each holds the whole frozen model, and one copy more of the adapters' gradients, in buckets.
    * zero2: the same, and a part of the optimizer's state.
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
            raise ConfigError(f"gpus is a whole number from 1 to {MOST_GPUS:,}; got {shown(self.gpus)}.")
        if self.sharding not in get_args(Sharding):
            raise ConfigError(f"sharding is {', '.join(get_args(Sharding))}; got {shown(self.sharding)}.")
        if self.gpus == 1 and self.sharding != "ddp":
            raise ConfigError(f"sharding {self.sharding} is for several GPUs: give gpus, at least 2, with it.")

    def loaded(self, model: LoadedModel) -> tuple[int, ...]:
        """Bytes of each storage of the frozen model on one GPU; the last is what is gathered."""
        if self.sharding in ("ddp", "zero2"):
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
        if self.sharding in ("ddp", "zero2"):
            states = states.with_buckets(1.0)
        if self.sharding == "zero2":
            states = replace(states, optimizer=np.ceil(states.optimizer / self.gpus))
        elif self.sharding != "ddp":
            names = ("weights", "optimizer", "fixed", "others", "other_gradients")
            states = replace(states, **{name: np.ceil(getattr(states, name) / self.gpus) for name in names})
        memory = replace(step.memory, states=states)
        return replace(step, memory=memory, model=replace(step.model, frozen=self.loaded(step.model)))
