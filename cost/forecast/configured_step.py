"""A training step described by a model's configuration, as plain data; imports no training library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ...common.errors import ConfigError, shown
from ...lora.spec import ModuleSpec, plain_ranks
from ..gathers import GatheredUnits, with_gathers, with_shared_gradients
from ..model import MemoryModel
from ..moments import LOSS_BYTES, Evaluation
from ..recording import BatchShape
from ..rollouts import Engine, Rollouts
from ..savers.prices import ACTIVATIONS, Measure, Saved, price_savers
from ..step_config import MOST_TOKENS, Attention, ExpertBits
from ..step_time import StepWork
from ..streaming import BaseLayers

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Precisions of the frozen model and their torch names."""

Implementation = Literal["eager", "sdpa", "flash", "flex"]
"""Attention implementation: separate operators, torch's SDPA, or a kernel that never materialises scores or a mask."""

LossKind = Literal["model", "chunked", "cut", "liger"]
"""Implementation of the loss. model: transformers or the exact savers. chunked: TRL's SFTTrainer, in tiles of the
vocabulary. cut: cut cross-entropy (arXiv:2411.09009), or another kernel that stores no logits. liger: Liger's kernel,
which stores none in training, and all of them in evaluation.
"""


@dataclass(frozen=True, kw_only=True)
class LoadedAs:
    """How the model is loaded and trained, in addition to `StepConfig`.

    Attributes:
        device: "cuda" or "cpu".
        dtype: precision of the frozen weights, a torch dtype or a name in `DTYPES`; by default that of the
            configuration. Adapters are then in fp32, as PEFT creates them.
        attention: attention kernels available on CUDA, unless the configuration asks for eager attention.
        padded: whether some rows of a batch are padded, which needs a mask and other kernels.
        double_quantization: whether the scales of nf4 weights are quantised too.
        reentrant: whether gradient checkpointing is torch's reentrant variant.
        input_gradients: whether the embedding's output requires gradients (`enable_input_require_grads`).
        keeps_output: whether the training loop keeps the model's output, including logits, until the step ends; the
            Trainer does not.
        adapter: further arguments of `peft.LoraConfig`, such as use_dora.
        experts: storage of fused experts in a quantised model.
        implementation: attention implementation in transformers; by default that of the configuration.
        loss: implementation of a causal language model's loss.
        fused_activations: whether activation functions composed of many operators in transformers run as their authors'
            published CUDA kernels (xIELU of Apertus).
        packed: whether a row holds several texts, so it may exceed the model's positions.
        offload: whether inputs of checkpointed layers stay in main memory until recomputation.
        expandable_segments: whether torch's allocator uses expandable segments.
        stream: number of layers whose frozen weights stream from main memory, evenly spread, or "all".
        eval_batch_size: rows of an evaluation batch; 0 for those of a training batch, "none" for no evaluation.
        eval_length: tokens of one of these rows; 0 for those of a training row.
        eval_packed: whether an evaluation batch holds its rows without padding, in one row.
        keep_logits: rows of an evaluation whose logits are on the device at once, for `compute_metrics`.
        rollouts: generation of answers between steps; None without.
        image: width and height in pixels of the pictures in a row, "1024x768"; empty for rows without pictures.
        images: number of such pictures in each row.
        max_pixels: the image processor's setting of this name (Qwen); 0 for the published one.
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
    stream: int | Literal["all"] = 0
    eval_batch_size: int | Literal["none"] = 0
    eval_length: int = 0
    eval_packed: bool = False
    keep_logits: int = 0
    rollouts: Rollouts | None = None
    image: str = ""
    images: int = 1
    max_pixels: int = 0

    def __post_init__(self) -> None:
        if self.stream != "all" and (type(self.stream) is not int or self.stream < 0):
            raise ConfigError(f'stream is a number of layers or "all"; got {shown(self.stream)}.')
        for name, words in (("eval_batch_size", " or none"), ("eval_length", ""), ("keep_logits", "")):
            value = getattr(self, name)
            if (value != "none" or not words) and (type(value) is not int or not 0 <= value <= MOST_TOKENS):
                raise ConfigError(
                    f"{name} must be a whole number from 0 to {MOST_TOKENS:,}{words}; got {shown(value)}."
                )
        if not self.image and (self.images, self.max_pixels) != (1, 0):
            given = f"{shown(self.images)} and {shown(self.max_pixels)}"
            raise ConfigError(f"images and max_pixels need image, such as image='1024x768'; got {given} without it.")

    @property
    def engine(self) -> Engine | None:
        """The vLLM engine that generates answers; None without one."""
        return self.rollouts.engine if self.rollouts else None

    def evaluation(self, shape: BatchShape, model: LoadedModel, *, bf16: bool) -> Evaluation | None:
        """Return the evaluation of a run with training batches of a shape; None for none.

        Args:
            shape: shape of a training batch.
            model: the model.
            bf16: whether it runs under bf16 autocast, after which the Trainer casts outputs to fp32.
        """
        if self.eval_batch_size == "none":
            return None
        rows, length = self.eval_batch_size or shape.rows, self.eval_length or shape.length
        one = BatchShape(1, rows * length) if self.eval_packed else BatchShape(rows, length)
        each = 4.0 if bf16 or model.precision == "float32" else 2.0
        every = model.words * (LOSS_BYTES + each) if self.loss == "liger" else 0.0
        return Evaluation(one, -(-self.keep_logits // rows), model.words * each, every)


@dataclass(frozen=True)
class LoadedModel:
    """A model with adapters, as loaded for training.

    Attributes:
        kind: name of its class.
        targets: its target modules.
        parameters: number of parameters of the frozen model; tied ones count once.
        frozen: bytes of each storage of the frozen model, in module order; shared ones count once.
        outside: total bytes of the storages outside the checkpointable layers.
        widest: bytes of the largest checkpointable layer.
        workspace_bytes: bytes that libraries take from the allocator for the process's lifetime; 0 on the CPU.
        products: number of weights in matrix products, and the width of the hidden states.
        precision: torch's name for the dtype of the first parameter.
        continues: whether the model is a causal language model.
        positions: most tokens per row; None if the model sets no limit.
        windows: sequence lengths at which sliding-window attention starts to mask tokens.
        keeps_state: whether its layers keep a state, so a recording covers one length only.
        fused: number of parameters in fused expert tensors, which quantisation on load does not reach.
        named: module names to use in place of "all-linear" where PEFT selects others; else empty.
        is_eager: whether attention stores the scores of all token pairs.
        has_xielu: whether it uses the xIELU activation function.
        words: vocabulary size in its configuration; 0 if not given.
        config: fields of its configuration; empty for a loaded model.
        own_code: whether the configuration refers to code shipped with the weights; predictions use transformers' code.
        task_type: PEFT's name for the task.
        saved_modules: names of fully trained modules, such as a new classifier.
        picture_tokens: tokens that the pictures in each row take; 0 for rows without pictures.
        picture_bytes: bytes of the pictures in each row, as the tower's input.
        pixels: pixels of a picture after scaling, if max_pixels decides them; else 0.
        sees: whether the model reads pictures too.
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
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    own_code: bool = False
    task_type: str | None = None
    saved_modules: tuple[str, ...] = ()
    picture_tokens: int = 0
    picture_bytes: int = 0
    pixels: int = 0
    sees: bool = False

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen model as loaded, including the scales of quantised weights."""
        return sum(self.frozen)


@dataclass(frozen=True)
class ConfiguredStep:
    """A training step.

    Attributes:
        memory: predicts the bytes of any plan and batch shape, excluding the frozen model; `memory.cost()` is their
            cost. It has no segments if the step runs without gradient checkpointing.
        model: the model.
        work: the step's computation; None if it was not counted.
        saved: bytes of a plain LoRA step as exact savers are added one by one; empty if not requested.
        loaded: how the model is loaded and trained.
        libraries: versions of the libraries that recorded it, if it comes from a file.
        leaner: creates the same step with selective checkpointing; returns None if that saves nothing or is disabled.
        measure: returns the byte model of the same batch with exactly these exact savers; None if it was not recorded.
    """

    memory: MemoryModel
    model: LoadedModel
    work: StepWork | None = field(default=None, repr=False)
    saved: tuple[Saved, ...] = ()
    leaner: Callable[[], ConfiguredStep | None] = field(default=lambda: None, repr=False)
    loaded: LoadedAs = field(default_factory=LoadedAs, repr=False)
    libraries: Mapping[str, str] = field(default_factory=dict)
    measure: Measure | None = field(default=None, repr=False)

    @property
    def targets(self) -> tuple[ModuleSpec, ...]:
        """The target modules."""
        return self.model.targets


class StepSource(Protocol):
    """Provides the memory and work of a step, by recording it or from a file."""

    @property
    def loaded(self) -> LoadedAs:
        """How the model is loaded."""

    @property
    def model(self) -> LoadedModel:
        """The model; the first step may permanently cast some of its biases."""

    def memory(self, savers: tuple[str, ...], shape: BatchShape) -> MemoryModel:
        """Return the byte model of the step with exactly these savers, for a batch of this shape."""

    def work(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        """Return the computation of a step with exactly these savers on a batch of this shape."""


def configured_step(source: StepSource, shape: BatchShape, savers: Sequence[str]) -> ConfiguredStep:
    """Return a step on a batch of this shape, with the requested exact savers that lower its peak."""
    plain = plain_ranks(source.model.targets)
    measure = partial(source.memory, shape=shape)
    priced = price_savers(measure, savers, plain)
    work, saved = source.work(priced.names, shape), priced.saved if savers else ()
    found = ConfiguredStep(priced.memory, source.model, work, saved, loaded=source.loaded, measure=measure)

    def leaner() -> ConfiguredStep | None:
        names = (*priced.names, ACTIVATIONS)
        memory = source.memory(names, shape)
        saved = Saved.of(ACTIVATIONS, memory, plain)
        if not saved.is_less(priced.saved[-1]):
            return None
        return replace(found, memory=memory, saved=(*priced.saved, saved), work=source.work(names, shape))

    return replace(found, leaner=leaner) if savers and priced.memory.segments else found


Sharding = Literal["ddp", "zero2", "fsdp2", "zero3"]

LIVE_PARAMETERS = 10**9
"""DeepSpeed's `stage3_max_live_parameters`."""

REDUCE_BUCKET_BYTES = 10**9
"""DeepSpeed's buffer for gradients on their way: `reduce_bucket_size`, 5e8 numbers, in 16 bits; "auto" takes less."""

MOST_GPUS = 2**16


@dataclass(frozen=True)
class Shards:
    """Number of GPUs that train together and their sharding. Figures are per GPU, each with its own batch.

    * ddp: each GPU holds the whole frozen model, and a second copy of the adapters' gradients in buckets.
    * zero2: each GPU holds the whole model, adapters in its precision, and a buffer of `REDUCE_BUCKET_BYTES`.
    * fsdp2: each GPU holds a shard of the frozen model, and gathers its units as the step reaches them; see
      `cost/gathers.py`.
    * zero3: each GPU holds a shard of the frozen parameters, up to `LIVE_PARAMETERS` gathered ones, and a buffer of as
      many numbers as the hidden width squared, which transformers sets for "auto".

    As in the Trainers, fsdp2 and zero3 also shard adapters; and all but ddp their gradients and the optimizer state.
    DeepSpeed (0.19.8) adds copies of the adapters in fp32 to that state.

    Raises:
        ConfigError: there is no GPU, or a single GPU is to shard.
    """

    gpus: int = 1
    sharding: Sharding = "ddp"

    def __post_init__(self) -> None:
        if type(self.gpus) is not int or not 1 <= self.gpus <= MOST_GPUS:
            raise ConfigError(f"gpus must be a whole number from 1 to {MOST_GPUS:,}; got {shown(self.gpus)}.")
        if self.sharding not in get_args(Sharding):
            raise ConfigError(f"sharding must be one of {', '.join(get_args(Sharding))}; got {shown(self.sharding)}.")
        if self.gpus == 1 and self.sharding != "ddp":
            raise ConfigError(f"sharding {self.sharding} needs several GPUs: set gpus to at least 2.")

    def loaded(self, model: LoadedModel) -> tuple[int, ...]:
        """Return the bytes of each storage of the frozen model on one GPU; the last are DeepSpeed's own."""
        if self.sharding == "zero2":
            return *model.frozen, REDUCE_BUCKET_BYTES
        if self.sharding == "ddp":
            return model.frozen
        gathered = int(model.frozen_bytes * min(LIVE_PARAMETERS / model.parameters, 1.0))
        shards = [-(-size // self.gpus) for size in model.frozen]
        return (*shards, gathered, 2 * model.products[1] ** 2) if self.sharding == "zero3" else tuple(shards)

    def of(self, step: ConfiguredStep) -> ConfiguredStep:
        """Return the step on one GPU."""
        if self.gpus == 1:
            return step
        saved, plain = step.saved, plain_ranks(step.targets)
        if step.measure and saved:
            names = [each.name for each in saved[1:]]
            shared = [self._memory(step.measure(tuple(names[:count])), step.model) for count in range(len(saved))]
            saved = tuple(Saved.of(each.name, memory, plain) for each, memory in zip(saved, shared, strict=True))
        model = replace(step.model, frozen=self.loaded(step.model))
        return replace(step, memory=self._memory(step.memory, step.model), model=model, saved=saved)

    def _memory(self, memory: MemoryModel, model: LoadedModel) -> MemoryModel:
        states = memory.states
        if self.sharding == "ddp":
            return replace(memory, states=states.with_buckets(1.0))
        names = ["optimizer", "scratch"]
        if self.sharding != "fsdp2":
            states = replace(states, optimizer=states.optimizer + states.weights)
            memory = with_shared_gradients(memory, self.gpus)
        if self.sharding == "zero2":
            part = 1.0 if model.precision == "float32" else 0.5
            states = replace(states, weights=np.ceil(part * states.weights))
        else:
            names += ["weights", "fixed", "others", "other_gradients"]
        if self.sharding == "fsdp2":
            memory = with_gathers(memory, gathered_units(model), self.gpus)
        shared = {name: np.ceil(getattr(states, name) / self.gpus) for name in names}
        return replace(memory, states=replace(states, **shared))


def gathered_units(model: LoadedModel) -> GatheredUnits:
    """Return the units that a GPU gathers under fsdp2; of an unknown vocabulary, all outside layers is embeddings."""
    table = model.words * model.products[1] * (4 if model.precision == "float32" else 2)
    table = min(table or model.outside, model.outside)
    head = table if 2 * table <= model.outside else 0
    return GatheredUnits(table, head, model.widest, model.outside - table - head)


def base_of(step: ConfiguredStep) -> BaseLayers:
    """Return the frozen weights of a step's checkpointable layers."""
    return BaseLayers.of(step.model.frozen, len(step.memory.recording.layers))


def without_streamed(step: ConfiguredStep, base: BaseLayers, count: int) -> ConfiguredStep:
    """Return a step with the frozen weights of so many layers off the device."""
    model = replace(step.model, frozen=base.on_device(step.model.frozen, count))
    return replace(step, model=model) if count else step


def streamed_layers(base: BaseLayers, asked: int | Literal["all"], shards: Shards) -> int:
    """Return the number of streamed layers.

    Raises:
        ConfigError: the model has fewer layers, or the cards share the base otherwise.
    """
    if asked and shards.sharding in ("fsdp2", "zero3"):
        raise ConfigError(f"stream={asked}: under {shards.sharding} the cards share the base, so it cannot stream.")
    if asked and not base.layer_bytes:
        raise ConfigError(f"stream={asked}: this model has no layers of equal frozen weights to stream.")
    count = base.count if asked == "all" else asked
    if count > base.count:
        raise ConfigError(f"stream={count}: this model has {base.count} layers to stream.")
    return count
