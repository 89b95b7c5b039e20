"""The memory of a training step from a model's configuration alone: no weight is loaded or allocated.

The model is made on the meta device, where tensors have shapes and no contents, with the head that it is usually
fine-tuned with; in four or eight bits its layers are bitsandbytes' own, on codes and scales without contents. The
package's own calibration runs its small steps there, as the device that is asked about would run them
(`cost/device_on_meta.py`). The byte model that comes out is the one that the same steps give on that device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from traceback import walk_tb
from typing import Any, Literal

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto

from ..errors import ConfigError, RankPilotError, UnsupportedError, first_line
from ..lora.peft_config import fresh_adapters, fused_experts, head_names, left_out
from ..lora.targets import TargetModule, find_target_modules
from . import training_step
from .breakdown import frozen_bytes, frozen_sizes
from .calibration import keeps_state, measure_memory
from .device_on_meta import Attention, DeviceOnMeta, autocast_known_on_meta, autocast_on_meta, device_on_meta
from .kernels_on_meta import cut_loss, fuse_activations, use_chunked_loss, use_flash_attention
from .live_storages import DeviceKind
from .model import MemoryModel
from .model_states import with_buckets
from .published import (
    WORKSPACE_BYTES,
    check_experts,
    check_length,
    check_reads_tokens,
    check_sizes,
    find_configuration,
    most_positions,
    stored_method,
)
from .quantised import adapters_on_quantised_experts, quantise, quiet
from .recording import BatchShape
from .repeated_layers import RepeatedLayers, measure_by_layers, work_by_layers
from .savers import CACHE, SAVERS, ExactSavers, Priced, Saved
from .step_config import ExpertBits, StepConfig
from .step_time import StepWork

_NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS")

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
        dtype: the precision of the frozen weights; by default that of the configuration. Adapters are then in fp32, as
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

    device: DeviceKind = "cuda"
    dtype: torch.dtype | None = None
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


@dataclass(frozen=True, eq=False)
class ConfiguredStep:
    """A training step that is known from a configuration.

    Attributes:
        memory: predicts the bytes of any plan and batch shape beside the frozen model; `memory.cost()` is their cost.
            It has no segments if the step runs without gradient checkpointing.
        model: the PEFT model, without contents.
        targets: its target modules.
        parameters: number of parameters of the frozen model, a tied one once.
        frozen_bytes: bytes of the frozen model as loaded, scales of quantised weights included.
        workspace_bytes: bytes that libraries take through the allocator for as long as the process lives; 0 on the CPU.
        positions: the most tokens of a row; None if the model sets no limit.
        work: what the step computes; None if it was not counted.
        saved: what a step of plain LoRA takes with each exact saver more, likewise.
        fused: how many of the parameters are experts in one tensor, which no quantisation of a loaded model reaches.
        named: names of modules to give in place of "all-linear", where that is of others in PEFT; else empty.
        loaded: how the model is loaded and trained.
        leaner: makes the same step with selective checkpointing; None where that saves nothing, or is not asked for.
    """

    memory: MemoryModel
    model: PeftModel = field(repr=False)
    targets: list[TargetModule] = field(repr=False)
    parameters: int
    frozen_bytes: int
    workspace_bytes: int
    positions: int | None
    work: StepWork | None = field(repr=False)
    saved: tuple[Saved, ...] = ()
    fused: int = 0
    named: tuple[str, ...] = ()
    loaded: LoadedAs = field(default_factory=LoadedAs, repr=False)
    leaner: Callable[[], ConfiguredStep | None] = field(default=lambda: None, repr=False)


def from_config(
    config: PreTrainedConfig | str,
    step: StepConfig,
    loaded: LoadedAs | None = None,
    *,
    counted: bool = False,
    checkpointing_optional: bool = False,
) -> ConfiguredStep:
    """What a training step takes, from a model's configuration.

    Args:
        config: of a transformers model, which is not changed; or what `find_configuration` takes: a folder, a
            config.json, a short name such as "qwen3-8b", a Hugging Face id.
        step: batch, length, target modules, optimizer, quantisation, autocast, checkpointing.
        loaded: how the model is loaded, and on which device; by default on CUDA as it was saved.
        counted: also count what the step computes, operator by operator, and price what each exact saver brings.
        checkpointing_optional: take the step without gradient checkpointing where the model's class has none.

    Returns:
        The byte model, and the bytes of the frozen base.

    Raises:
        ConfigError: the model reads no tokens, or has fewer positions than a row has tokens; no model can be made from
            the configuration, or no adapter on it.
        UnknownNameError, AssetError: there is no such target module, or no such model.
        UnsupportedError: what the model computes depends on contents, so it cannot be predicted; or bitsandbytes or
            gradient checkpointing is missing.
    """
    config = find_configuration(config) if isinstance(config, str) else copy.deepcopy(config)
    check_reads_tokens(config)
    check_sizes(config)
    check_experts(config)
    stored_method(config, step.quantization)
    loaded = loaded or LoadedAs()
    auto_class = usual_class(config)
    device = DeviceOnMeta(loaded.device, loaded.attention, loaded.padded)
    with _on_meta(device):
        if loaded.implementation in ("eager", "sdpa"):
            config._attn_implementation = loaded.implementation
        base = base_on_meta(config, auto_class, loaded.dtype)
        if not loaded.packed:
            check_length(step.max_length, base)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        fused = sum(experts.numel() for experts in fused_experts(base))
        if loaded.implementation in ("flash", "flex"):
            use_flash_attention(base)
        if loaded.fused_activations and loaded.device == "cuda":
            fuse_activations(base)
        if checkpointing_optional and not training_step.has_checkpointing(base):
            step = replace(step, gradient_checkpointing=False)
        kind = PEFT_TYPES[auto_class]
        model = _adapted(_quantised(base, step, loaded, kind), step, loaded, kind)
        if loaded.loss != "model":
            (cut_loss if loaded.loss == "cut" else use_chunked_loss)(base)
        return _recorded(model, base, (parameters, fused), step, loaded, device, counted=counted)


@contextmanager
def _on_meta(device: DeviceOnMeta) -> Iterator[None]:
    """A hollow device, without what libraries say about contents that are not there."""
    patches = autocast_known_on_meta(), adapters_on_quantised_experts()
    with device_on_meta(device), patches[0], patches[1], quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _predictable(config: PreTrainedConfig) -> Iterator[None]:
    """Tell what went wrong in a step as an error of the configuration, or of a step that cannot run like this."""
    try:
        yield
    except RankPilotError:
        raise
    except AttributeError as error:
        raise ConfigError(f"The configuration lacks what its model needs: {first_line(error)}") from error
    except (RuntimeError, NotImplementedError, ValueError, TypeError, ArithmeticError) as error:
        needs = isinstance(error, NotImplementedError) or "meta tensor" in str(error)
        why = "because what it computes depends on contents" if needs else "because it failed"
        if any(
            str(frame.f_globals.get("__name__")).startswith("liger_kernel") for frame, _ in walk_tb(error.__traceback__)
        ):
            raise UnsupportedError(
                f"Liger has replaced parts of {config.model_type!r} in this process, and its kernels need a GPU's "
                "numbers: predict the step before that, or in another process (`rankpilot memory`)."
            ) from error
        raise UnsupportedError(
            f"A step of {config.model_type!r} cannot be predicted from its configuration, {why} "
            f"({first_line(error)[:120]}). Load the model, and measure it with `rankpilot memory`."
        ) from error


def _training(model: PeftModel, step: StepConfig, loaded: LoadedAs) -> training_step.TrainingStep:
    """The step with its optimizer and its loss."""
    with torch.device("cpu"):  # an 8-bit optimizer makes the table of its codes
        optimizer = training_step.new_optimizer(step.optimizer, model)
    loss = _loss(model, step, loaded)
    return training_step.TrainingStep(model, loss, optimizer, accumulates=step.accumulation > 1)


def _recorded(
    model: PeftModel,
    base: PreTrainedModel,
    counts: tuple[int, int],
    step: StepConfig,
    loaded: LoadedAs,
    device: DeviceOnMeta,
    *,
    counted: bool,
) -> ConfiguredStep:
    """The step of a model; also what exact savers bring and what it computes, if that is counted.

    `counts` are its parameters, and those of them that are fused experts.
    """
    config, shape, targets = base.config, BatchShape(step.batch_size, step.max_length), find_target_modules(model)
    training = _training(model, step, loaded)
    calibrated = shape if keeps_state(model) else calibration_shape(config, shape, padded=loaded.padded)
    batch = batch_on_meta(base, calibrated)
    asked = batch_on_meta(base, shape)
    savers = ExactSavers(model, [name for name in SAVERS if name != CACHE] if step.exact_savers else ())  # it has none

    ways = RepeatedLayers.of(model, targets)

    def measured() -> MemoryModel:
        memory = measure_by_layers(training, targets, batch, ways)
        if not memory.predicts(shape):
            memory = measure_memory(training, targets, batch_on_meta(base, shape), signals=False)
        memory = replace(memory, shape=shape)
        return memory.offloaded() if loaded.offload else memory

    def counted_work() -> StepWork:
        return work_by_layers(training, targets, asked, ways)

    def leaner() -> ConfiguredStep | None:
        with _on_meta(device), _predictable(config):
            lean = savers.with_activations(priced, measured, targets)
            if lean is None:
                return None
            return replace(found, memory=lean.memory, saved=lean.saved, work=counted_work())

    with _predictable(config):
        prices = step.exact_savers and counted
        priced = savers.price(measured, targets) if prices else Priced(memory := measured(), memory, ())
        work = counted_work() if counted else None
    found = ConfiguredStep(
        memory=priced.memory,
        model=model,
        targets=targets,
        parameters=counts[0],
        fused=counts[1],
        frozen_bytes=frozen_bytes(model),
        workspace_bytes=2 * WORKSPACE_BYTES if loaded.device == "cuda" else 0,
        positions=most_positions(base),
        work=work,
        saved=priced.saved,
        named=_named(model) if left_out(base) else (),
        loaded=loaded,
    )
    return replace(found, leaner=leaner) if prices and priced.memory.segments else found


def _named(model: PeftModel) -> tuple[str, ...]:
    """The names of target modules; none where they are a regular expression."""
    names = model.peft_config["default"].target_modules
    return () if isinstance(names, str) else tuple(sorted(names))


def _quantised(base: PreTrainedModel, step: StepConfig, loaded: LoadedAs, kind: str) -> PreTrainedModel:
    if step.quantization == "none":
        return base
    return quantise(
        base,
        step.quantization,
        double_quantization=loaded.double_quantization,
        kept=head_names(base) if kind in _NEW_HEADS else None,
        prepare=step.prepare_kbit,
        experts=loaded.experts,
    )


def _adapted(base: PreTrainedModel, step: StepConfig, loaded: LoadedAs, kind: str) -> PeftModel:
    """The model with adapters, in the mode in which it trains."""
    if step.gradient_checkpointing is True:
        training_step.switch_checkpointing(base, True, reentrant=loaded.reentrant)
    model = fresh_adapters(
        base,
        base.config.model_type,
        kind,
        new_head=kind in _NEW_HEADS,
        target_modules=step.target_modules,
        target_parameters=step.target_parameters,
        **{"r": 8, "lora_alpha": 16} | loaded.adapter,
    )
    if loaded.input_gradients:
        base.enable_input_require_grads()
    else:
        training_step.release_inputs(model)  # PEFT makes them require gradients again
    return model.train()


def _loss(model: PeftModel, step: StepConfig, loaded: LoadedAs) -> training_step.LossFunction:
    """The loss of a batch under the step's precision."""
    plain = training_step.model_loss(model)
    if loaded.keeps_output:
        model.register_forward_hook(_keep_logits)

    def loss(batch: Any) -> torch.Tensor:
        with autocast_on_meta(torch.bfloat16 if step.bf16 else None):
            return plain(batch)

    return loss


def _keep_logits(model: torch.nn.Module, arguments: Any, output: Any) -> None:
    """Let the loss keep the logits alive."""
    if getattr(output, "loss", None) is not None:
        output.loss.kept = output.logits


PEFT_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForImageTextToText": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
"""Classes of transformers that make a model with a head, and PEFT's `task_type` for it."""


_ENDINGS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def usual_class(config: PreTrainedConfig) -> str:
    """The class of transformers that makes a model with the head that its architecture is usually fine-tuned with."""
    kind = type(config)
    for architecture in config.architectures or ():
        for ending, name in _ENDINGS.items():
            if architecture.endswith(ending):
                return name
    if kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "AutoModelForSeq2SeqLM"
    sees = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if sees and kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return "AutoModelForImageTextToText"
    reads_one_way = (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    )
    return "AutoModelForCausalLM" if reads_one_way else "AutoModelForSequenceClassification"


def base_on_meta(config: PreTrainedConfig, auto_class: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration, which is changed as a Trainer and a loaded model change it.

    Args:
        config: the configuration.
        auto_class: a key of `PEFT_TYPES`.
        dtype: the precision of weights; by default that of the configuration. Attention by flash_attention_2 or 3, flex
            or a kernel of the hub is that of torch, which holds as much for the backward pass.

    Raises:
        ConfigError: the class has no model of this kind.
    """
    text = config.get_text_config()
    config.use_cache = text.use_cache = False
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None
    try:
        dtype = dtype or config.dtype or torch.float32
        kind = getattr(transformers, auto_class)
        base: PreTrainedModel = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ConfigError(
            f"No {auto_class} can be made from this configuration of {config.model_type!r}: {first_line(error)}"
        ) from error
    if getattr(config, "scale_decoder_outputs", True) is False:
        # A T5 of version 1.1: its configuration says that the output layer is tied, and its weights say that it is not.
        base.lm_head.weight = nn.Parameter(torch.empty_like(base.lm_head.weight))
    return base


MASK_ALIGNMENT = 16
"""The memory-efficient kernel copies a mask whose rows are no multiple of this long."""


_WINDOWS = ("sliding_window", "local_attention", "attention_window", "attention_chunk_size")
"""What configurations call the tokens that a token sees at the most."""


def calibration_shape(config: PreTrainedConfig, shape: BatchShape, *, padded: bool) -> BatchShape:
    """A shape, at least as large, such that all steps of a calibration on it run the operators that `shape` runs.

    Calibration halves lengths. So half of this length is beyond an attention window that `shape` is beyond, and a
    multiple of `MASK_ALIGNMENT` where there is padding. Without contents larger steps cost nothing.
    """
    text = config.get_text_config()
    windows = [getattr(text, name, None) or 0 for name in _WINDOWS]
    length = max([shape.length, *(2 * w for w in windows if isinstance(w, int) and 0 < w <= shape.length)])
    if padded:
        length += -length % (2 * MASK_ALIGNMENT)
    return BatchShape(max(shape.rows, 4), length)


def batch_on_meta(model: PreTrainedModel, shape: BatchShape) -> dict[str, torch.Tensor]:
    """Token ids, a mask and labels on the default device; labels have one axis for a classifier of whole rows.

    An encoder-decoder writes texts of the same length.
    """
    tokens = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    name = type(model).__name__
    rows_only = name.endswith("ForSequenceClassification")
    regression = rows_only and model.config.num_labels == 1
    labels = torch.zeros(shape.rows, dtype=torch.float32 if regression else torch.long) if rows_only else tokens.clone()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


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

    def loaded(self, step: ConfiguredStep) -> list[int]:
        """Bytes of each storage of the frozen model on one GPU; the last is what is gathered."""
        sizes = frozen_sizes(step.model)
        if self.sharding == "ddp":
            return sizes
        return [*(-(-size // self.gpus) for size in sizes), min(self._gathered(step), sum(sizes))]

    def _gathered(self, step: ConfiguredStep) -> int:
        whole = frozen_bytes(step.model)
        if self.sharding == "zero3":
            return int(whole * min(LIVE_PARAMETERS / step.parameters, 1.0))
        modules = step.model.modules()
        layers = [frozen_bytes(module) for module in modules if isinstance(module, GradientCheckpointingLayer)]
        return whole - sum(layers) + 2 * max(layers, default=0)

    def of(self, step: ConfiguredStep) -> ConfiguredStep:
        """The step on one GPU."""
        if self.gpus == 1:
            return step
        states = step.memory.states
        if self.sharding == "ddp":
            states = with_buckets(states, step.model, step.targets, 1.0)
        else:
            names = ("weights", "optimizer", "fixed", "others", "other_gradients")
            states = replace(states, **{name: np.ceil(getattr(states, name) / self.gpus) for name in names})
        memory = replace(step.memory, states=states)
        return replace(step, memory=memory, frozen_bytes=sum(self.loaded(step)))
