"""The memory of a training step from a model's configuration alone: no weight is loaded or allocated.

The model is made on the meta device, where tensors have shapes and no contents, with the head that it is usually
fine-tuned with; in four or eight bits its layers are bitsandbytes' own, on codes and scales without contents. The
package's own calibration runs its small steps there, as the device that is asked about would run them
(`cost/device_on_meta.py`). The byte model that comes out is the one that the same steps give on that device.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from traceback import walk_tb
from typing import Any

import torch
import transformers
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import ConfigError, RankPilotError, UnsupportedError, first_line
from ..lora.peft_config import fresh_adapters, fused_experts, head_names, left_out
from ..lora.spec import ModuleSpec
from ..lora.targets import find_target_modules
from . import training_step
from .calibration import keeps_state, measure_memory, step_states
from .cards import WORKSPACE_BYTES
from .configured_step import ConfiguredStep, LoadedModel, configured_step
from .device_on_meta import DeviceOnMeta, autocast_on_meta, device_on_meta
from .live_storages import META_STANDS_FOR, DeviceKind
from .model import MemoryModel, ModelStates
from .model_states import frozen_bytes, frozen_sizes
from .published import (
    check_experts,
    check_reads_tokens,
    check_sizes,
    find_configuration,
    most_positions,
    stored_method,
)
from .recording import BatchShape
from .repeated_layers import RepeatedLayers, measure_by_layers, work_by_layers
from .saver_prices import FREE_SAVERS
from .savers import ExactSavers
from .step_config import Attention, OptimizerName, Quantization, StepConfig, check_length
from .step_time import StepWork

_NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS")


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
    recorder = StepRecorder(config, step, loaded, checkpointing_optional=checkpointing_optional)
    shape = BatchShape(step.batch_size, step.max_length)
    check_length(step.max_length, recorder.model.positions)
    savers = FREE_SAVERS if step.exact_savers else ()
    if counted:
        return configured_step(recorder, shape, savers)
    memory = recorder.memory(savers, shape)
    return ConfiguredStep(memory, recorder.model)


class StepRecorder:
    """A model without contents, ready to record its training step, and to count what that computes.

    Args:
        config, step, loaded, checkpointing_optional: see `from_config`, which tells the errors as well. The batch that
            `step` names does not matter.
    """

    def __init__(
        self,
        config: PreTrainedConfig | str,
        step: StepConfig,
        loaded: LoadedAs | None = None,
        *,
        checkpointing_optional: bool = False,
    ) -> None:
        config = find_configuration(config) if isinstance(config, str) else copy.deepcopy(config)
        check_reads_tokens(config)
        check_sizes(config)
        check_experts(config)
        stored_method(config, step.quantization)
        self._loaded = loaded or LoadedAs()
        self._device = DeviceOnMeta(self._loaded.device, self._loaded.attention, self._loaded.padded)
        auto_class = usual_class(config)
        kind = PEFT_TYPES[auto_class]
        with _on_meta(self._device):
            self._base = base = base_on_meta(config, auto_class, self._loaded.dtype)
            parameters = sum(parameter.numel() for parameter in base.parameters())
            if checkpointing_optional and not training_step.has_checkpointing(base):
                step = replace(step, gradient_checkpointing=False)
            model = _adapted(_quantised(base, step, self._loaded, kind), step, self._loaded, kind)
            self._targets = find_target_modules(model)
            self._training = training_step.TrainingStep(
                model, _loss(model, step, self._loaded), _optimizer(step, model), accumulates=step.accumulation > 1
            )
            self._ways = RepeatedLayers.of(model, self._targets)
            self._savers = ExactSavers(model, ())
        self._keeps_state, self._peft, self._parameters = keeps_state(model), model, parameters
        self._auto_class = auto_class

    @property
    def model(self) -> LoadedModel:
        """What is known of the model now."""
        base, model = self._base, self._peft
        lora = model.peft_config["default"]
        frozen = frozen_sizes(model)
        layers = [frozen_bytes(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        return LoadedModel(
            kind=type(base).__name__,
            targets=tuple(ModuleSpec(each.name, each.block, each.d_in, each.d_out) for each in self._targets),
            parameters=self._parameters,
            frozen=tuple(frozen),
            outside=sum(frozen) - sum(layers),
            widest=max(layers, default=0),
            workspace_bytes=2 * WORKSPACE_BYTES if self._loaded.device == "cuda" else 0,
            continues=self._auto_class == "AutoModelForCausalLM",
            positions=most_positions(base),
            windows=tuple(sorted(set(_windows(base.config)))),
            keeps_state=self._keeps_state,
            fused=sum(experts.numel() for experts in fused_experts(base)),
            named=tuple(sorted(lora.target_modules)) if left_out(base) else (),
            task_type=lora.task_type and str(getattr(lora.task_type, "value", lora.task_type)),
            saved_modules=tuple(lora.modules_to_save or ()),
        )

    @contextmanager
    def _with(self, savers: tuple[str, ...]) -> Iterator[None]:
        """The model with these exact savers, on the device that it is on."""
        with _on_meta(self._device), _predictable(self._base.config):
            self._savers.take(savers)
            yield

    def memory(self, savers: tuple[str, ...], shape: BatchShape) -> MemoryModel:
        """The byte model of the step with these exact savers, for a batch of this shape."""
        known = shape
        if not self._keeps_state:
            known = calibration_shape(self._base.config, shape, padded=self._loaded.padded)
        with self._with(savers):
            memory = measure_by_layers(self._training, self._targets, batch_on_meta(self._base, known), self._ways)
            if not memory.predicts(shape):
                batch = batch_on_meta(self._base, shape)
                memory = measure_memory(self._training, self._targets, batch, signals=False)
        return replace(memory, shape=shape)

    def work(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        """What the step with these exact savers computes on a batch of this shape."""
        with self._with(savers):
            return work_by_layers(self._training, self._targets, batch_on_meta(self._base, shape), self._ways)

    def states(self, optimizer: OptimizerName) -> ModelStates:
        """What the adapters and this optimizer hold between steps."""
        with _on_meta(self._device):
            made = _optimizer(StepConfig(optimizer=optimizer), self._training.model)
            return step_states(replace(self._training, optimizer=made), self._targets, signals=False)


def _optimizer(step: StepConfig, model: PeftModel) -> torch.optim.Optimizer:
    with torch.device("cpu"):  # an 8-bit optimizer makes the table of its codes
        return training_step.new_optimizer(step.optimizer, model)


@contextmanager
def _on_meta(device: DeviceOnMeta) -> Iterator[None]:
    """A hollow device, without what libraries say about contents that are not there."""
    with device_on_meta(device), quiet(), warnings.catch_warnings():
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


def _quantised(base: PreTrainedModel, step: StepConfig, loaded: LoadedAs, kind: str) -> PreTrainedModel:
    if step.quantization == "none":
        return base
    return quantise(
        base,
        step.quantization,
        double_quantization=loaded.double_quantization,
        kept=head_names(base) if kind in _NEW_HEADS else None,
        prepare=step.prepare_kbit,
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


def _windows(config: PreTrainedConfig) -> list[int]:
    """The tokens that a token sees at the most, in layers where these are fewer than all."""
    text = config.get_text_config()
    return [value for name in _WINDOWS if isinstance(value := getattr(text, name, None), int) and value > 0]


def calibration_shape(config: PreTrainedConfig, shape: BatchShape, *, padded: bool) -> BatchShape:
    """A shape, at least as large, such that all steps of a calibration on it run the operators that `shape` runs.

    Calibration halves lengths. So half of this length is beyond an attention window that `shape` is beyond, and a
    multiple of `MASK_ALIGNMENT` where there is padding. Without contents larger steps cost nothing.
    """
    length = max([shape.length, *(2 * window for window in _windows(config) if window <= shape.length)])
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


BLOCK = 64
"""Weights that share one scale in nf4."""

SCALES_BLOCK = 256
"""Scales that share one scale of theirs, where scales are quantised too."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep bitsandbytes from saying at every 8-bit product that it casts the inputs."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def quantise(
    model: PreTrainedModel,
    quantization: Quantization,
    *,
    double_quantization: bool = True,
    kept: list[str] | None = None,
    prepare: bool = True,
) -> PreTrainedModel:
    """A hollow model as transformers loads it in fewer bits and PEFT prepares it for training.

    Args:
        model: on the meta device; it is changed. Products with nf4 weights are in its precision.
        quantization: nf4 or int8.
        double_quantization: whether nf4's scales are stored in eight bits.
        kept: names of modules that are not quantised; by default those that transformers chooses, such as the output
            layer.
        prepare: see `StepConfig.prepare_kbit`.

    Raises:
        UnsupportedError: bitsandbytes is missing.
    """
    training_step.check_installed(quantization=quantization)
    loaded = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}[quantization]
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**{loaded: True}), pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(model, kept, model._keep_in_fp32_modules)
    compute_dtype = model.dtype
    for name, module in list(model.named_modules()):
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped):
            d_in, d_out = module.weight.shape[:: 1 if isinstance(module, Conv1D) else -1]
            if quantization == "nf4":
                layer = _four_bit_layer(d_in, d_out, compute_dtype, double_quantization, module.weight.dtype)
            else:
                layer = _eight_bit_layer(d_in, d_out)
            layer.bias = module.bias
            layer.source_cls = type(module)
            layer.requires_grad_(False)
            model.set_submodule(name, layer)
    setattr(model, f"is_{loaded.replace('load', 'loaded')}", True)
    model.is_quantized = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if prepare else model
    return model.requires_grad_(False)


def _four_bit_layer(d_in: int, d_out: int, compute_dtype: torch.dtype, double: bool, dtype: torch.dtype) -> Any:
    bnb: Any = import_module("bitsandbytes")
    new_state = bnb.functional.QuantState
    blocks = -(-d_in * d_out // BLOCK)
    scales = torch.empty(blocks, dtype=torch.uint8 if double else torch.float32)
    inner: dict[str, Any] = {}
    if double:
        scales_of_scales = torch.empty(-(-blocks // SCALES_BLOCK))
        state = new_state(absmax=scales_of_scales, code=torch.empty(256), blocksize=SCALES_BLOCK, dtype=torch.float32)
        inner = {"offset": torch.empty(()), "state2": state}
    state = new_state(
        absmax=scales,
        shape=torch.Size((d_out, d_in)),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        **inner,
    )
    layer = bnb.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    codes = torch.empty((d_in * d_out + 1) // 2, 1, dtype=torch.uint8)
    options = {"quant_state": state, "compress_statistics": double, "quant_type": "nf4", "bnb_quantized": True}
    layer.weight = bnb.nn.Params4bit(codes, blocksize=BLOCK, module=layer, **options)
    layer.quant_state = state
    return layer


def _eight_bit_layer(d_in: int, d_out: int) -> Any:
    bnb: Any = import_module("bitsandbytes")
    product: Any = import_module("bitsandbytes.autograd._functions").MatMul8bitFp.apply

    class OnCpu(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """The layer as it trains on the CPU: it makes its weight whole for each product."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """The product of inputs of shape (..., d_in) and the weight."""
            if self.bias is not None and self.bias.dtype != inputs.dtype:
                self.bias.data = self.bias.data.to(inputs.dtype)
            output: torch.Tensor = product(inputs, self.weight, None, self.bias, self.state)
            return output

    kind = OnCpu if META_STANDS_FOR.get() == "cpu" else bnb.nn.Linear8bitLt
    # Which columns are outliers, and computed in 16 bits, depends on the data: they are few, and not counted.
    layer = kind(d_in, d_out, bias=False, has_fp16_weights=False, threshold=0.0)
    codes = torch.empty(d_out, d_in, dtype=torch.int8)
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    layer.state.CB, layer.state.SCB = codes, torch.empty(d_out)
    return layer
