"""Predict the memory of a training step from a model's configuration alone; no weights are loaded or allocated.

The model is created on the meta device, where tensors have shapes but no contents, with its usual fine-tuning head.
Quantised layers are bitsandbytes' own, with empty codes and scales. The regular calibration runs its small steps there
as the requested device would (`cost/record/device_on_meta.py`). The resulting byte model equals the one measured by the
same steps on that device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from traceback import walk_tb
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto

from ...common.errors import ConfigError, RankPilotError, UnsupportedError, first_line
from ...lora.peft_config import fresh_adapters, fused_experts, head_names, left_out
from ...lora.spec import ModuleSpec
from ...lora.targets import find_target_modules
from .. import training_step
from ..cards import WORKSPACE_BYTES
from ..model import MemoryModel, ModelStates
from ..record.calibration import keeps_state, measure_memory, step_states
from ..record.device_on_meta import DeviceOnMeta, autocast_known_on_meta, autocast_on_meta, device_on_meta
from ..record.kernels_on_meta import cut_loss, fuse_activations, fused_scans, use_chunked_loss, use_flash_attention
from ..record.known_contents import known_contents
from ..record.model_states import frozen_bytes, frozen_sizes
from ..record.quantised import adapters_on_quantised_experts, quantise, quiet
from ..record.repeated_layers import RepeatedLayers, measure_by_layers, work_by_layers
from ..record.work import product_sizes
from ..recording import BatchShape
from ..savers.exact import ExactSavers
from ..savers.prices import free_savers
from ..step_config import OptimizerName, StepConfig, check_length
from ..step_time import MASK_ALIGNMENT, StepWork
from .configured_step import DTYPES, ConfiguredStep, LoadedAs, LoadedModel, configured_step
from .pictures import LENGTH, RowPictures, check_holds, row_pictures
from .published import (
    check_experts,
    check_reads_tokens,
    check_sizes,
    find_configuration,
    most_positions,
    said_of,
    stored_method,
)

_NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS")


def from_config(
    config: PreTrainedConfig | str,
    step: StepConfig,
    loaded: LoadedAs | None = None,
    *,
    counted: bool = False,
) -> ConfiguredStep:
    """Predict the memory of a training step from a model's configuration.

    Args:
        config: configuration of a transformers model, left unchanged; or any argument of `find_configuration`: a
            folder, a config.json, a short name such as "qwen3-8b", a Hugging Face id.
        step: batch, length, target modules, optimizer, quantisation, autocast, checkpointing.
        loaded: how the model is loaded, and on which device; by default on CUDA in its saved precision.
        counted: also count the step's computation per operator, and price each exact saver.

    Returns:
        The byte model, and the bytes of the frozen base.

    Raises:
        ConfigError: the model reads no tokens, or has fewer positions than a row has tokens; the configuration forms no
            model, or supports no adapter.
        UnknownNameError, AssetError: there is no such target module, or no such model.
        UnsupportedError: the computation depends on tensor contents, so it cannot be predicted; or bitsandbytes or
            gradient checkpointing is missing.
    """
    recorder = StepRecorder(config, step, loaded)
    shape = BatchShape(step.batch_size, step.max_length)
    model = recorder.model
    if not recorder.loaded.packed:
        check_length(step.max_length, model.positions)
    savers = free_savers(model.targets) if step.exact_savers else ()
    if counted:
        return configured_step(recorder, shape, savers)
    memory = recorder.memory(savers, shape)
    return ConfiguredStep(memory, recorder.model, loaded=recorder.loaded)


class StepRecorder:
    """A model on the meta device, ready to record its training step and count its computation.

    Args:
        config, step, loaded: see `from_config`, also for errors. The batch of `step` is ignored.
        checkpointing_optional: omit gradient checkpointing if the model class does not support it.

    Attributes:
        loaded: how the model is loaded.
    """

    loaded: LoadedAs

    def __init__(
        self,
        config: PreTrainedConfig | str,
        step: StepConfig,
        loaded: LoadedAs | None = None,
        *,
        checkpointing_optional: bool = False,
    ) -> None:
        config = find_configuration(config) if isinstance(config, str) else copy.deepcopy(config)
        check_sizes(config)
        check_reads_tokens(config)
        check_experts(config)
        stored_method(config, step.quantization)
        self.loaded = loaded = loaded or LoadedAs()
        self._device = DeviceOnMeta(loaded.device, loaded.attention, loaded.padded)
        self._pictures = None
        if loaded.image:
            self._pictures = row_pictures(config, loaded.image, loaded.images, loaded.max_pixels)
        self._auto_class = auto_class = "AutoModelForImageTextToText" if self._pictures else usual_class(config)
        kind = PEFT_TYPES[auto_class]
        with _on_meta(self._device):
            if loaded.implementation in ("eager", "sdpa"):
                config._attn_implementation = loaded.implementation
            self._base = base = base_on_meta(config, auto_class, _dtype(loaded.dtype))
            self._counts = (
                sum(parameter.numel() for parameter in base.parameters()),
                sum(experts.numel() for experts in fused_experts(base)),
            )
            if loaded.implementation in ("flash", "flex"):
                use_flash_attention(base)
            if loaded.fused_activations and loaded.device == "cuda":
                fuse_activations(base)
            if checkpointing_optional and not training_step.has_checkpointing(base):
                step = replace(step, gradient_checkpointing=False)
            self._peft = model = _adapted(_quantised(base, step, loaded, kind), step, loaded, kind)
            if loaded.loss != "model":
                (cut_loss if loaded.loss == "cut" else use_chunked_loss)(base)
            self._targets = find_target_modules(model)
            if empty := next((each.name for each in self._targets if each.max_rank < 1), ""):
                raise ConfigError(f"The configuration of {config.model_type!r} gives {empty} a width of 0.")
            self._training = training_step.TrainingStep(
                model, _loss(model, step, loaded), _optimizer(step, model), accumulates=step.accumulation > 1
            )
            self._ways = RepeatedLayers.of(model, self._targets)
            self._savers = ExactSavers(model, ())
        self._keeps_state = keeps_state(model)

    @property
    def model(self) -> LoadedModel:
        """The model in its current state."""
        base, model = self._base, self._peft
        lora = model.peft_config["default"]
        frozen = frozen_sizes(model)
        layers = [frozen_bytes(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        return LoadedModel(
            kind=type(base).__name__,
            targets=tuple(
                ModuleSpec(each.name, each.block, each.d_in, each.d_out, experts=each.experts) for each in self._targets
            ),
            parameters=self._counts[0],
            frozen=tuple(frozen),
            outside=sum(frozen) - sum(layers),
            widest=max(layers, default=0),
            workspace_bytes=2 * WORKSPACE_BYTES if self.loaded.device == "cuda" else 0,
            products=product_sizes(model),
            precision=str(base.dtype).removeprefix("torch."),
            continues=PEFT_TYPES[self._auto_class] == "CAUSAL_LM",
            positions=most_positions(base),
            windows=tuple(sorted(set(_windows(base.config)))),
            keeps_state=self._keeps_state,
            fused=self._counts[1],
            named=_named(model) if left_out(base) else (),
            is_eager=getattr(base.config, "_attn_implementation", "") == "eager",
            has_xielu=any(type(module).__name__ == "XIELUActivation" for module in base.modules()),
            task_type=lora.task_type and str(getattr(lora.task_type, "value", lora.task_type)),
            saved_modules=tuple(lora.modules_to_save or ()),
            picture_tokens=self._pictures.tokens if self._pictures else 0,
            picture_bytes=self._pictures.bytes if self._pictures else 0,
            pixels=(self._pictures.pixels or 0) if self._pictures else 0,
            sees=sees(base.config),
        )

    @contextmanager
    def _with(self, savers: tuple[str, ...]) -> Iterator[None]:
        """Enable exactly these savers on the model, on its emulated device."""
        scans = fused_scans(self._base) if self.loaded.device == "cuda" else nullcontext()
        with _on_meta(self._device), _predictable(self._base.config), scans:
            self._savers.take(savers)
            yield

    def memory(self, savers: tuple[str, ...], shape: BatchShape) -> MemoryModel:
        """Return the byte model of the step with these exact savers, for a batch of this shape."""
        pictures, known = self._pictures, shape
        if not self._keeps_state and (pictures is None or pictures.alike):
            least = 2 * pictures.tokens if pictures else 0  # half the length still holds the pictures
            known = calibration_shape(self._base.config, shape, padded=self.loaded.padded, least=least)
        with self._with(savers), towers_cut(self._base) if pictures else nullcontext():
            with self._batch(known) as batch:
                memory = measure_by_layers(self._training, self._targets, batch, self._ways)
            if not memory.predicts(shape):
                with self._batch(shape) as batch:
                    memory = measure_memory(self._training, self._targets, batch, signals=False)
        memory = replace(memory, shape=shape)
        return memory.offloaded() if self.loaded.offload else memory

    def work(self, savers: tuple[str, ...], shape: BatchShape) -> StepWork:
        """Return the computation of the step with these exact savers on a batch of this shape."""
        with self._with(savers), self._batch(shape) as batch:
            return work_by_layers(self._training, self._targets, batch, self._ways)

    @contextmanager
    def _batch(self, shape: BatchShape) -> Iterator[dict[str, torch.Tensor]]:
        """Yield a batch of this shape on the meta device."""
        if self._pictures is None:
            yield batch_on_meta(self._base, shape)
            return
        with known_contents(batch_with_pictures(self._base, self._pictures, shape, self.loaded.padded)) as batch:
            yield batch

    def states(self, optimizer: OptimizerName) -> ModelStates:
        """Return the state held by the adapters and this optimizer between steps."""
        with _on_meta(self._device):
            made = _optimizer(StepConfig(optimizer=optimizer), self._training.model)
            return step_states(replace(self._training, optimizer=made), self._targets, signals=False)


def _dtype(given: Any) -> torch.dtype | None:
    found: torch.dtype | None = getattr(torch, DTYPES[given]) if isinstance(given, str) else given
    return found


def _optimizer(step: StepConfig, model: PeftModel) -> torch.optim.Optimizer:
    with torch.device("cpu"):  # an 8-bit optimizer builds its code table
        return training_step.new_optimizer(step.optimizer, model)


@contextmanager
def _on_meta(device: DeviceOnMeta) -> Iterator[None]:
    """Enter an emulated device, and silence library warnings about missing contents."""
    patches = autocast_known_on_meta(), adapters_on_quantised_experts()
    with device_on_meta(device), patches[0], patches[1], quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _predictable(config: PreTrainedConfig) -> Iterator[None]:
    """Convert errors in a step to errors of the configuration or of an unsupported step."""
    try:
        yield
    except RankPilotError:
        raise
    except AttributeError as error:
        raise ConfigError(f"The configuration lacks a setting its model needs: {first_line(error)}") from error
    except (RuntimeError, NotImplementedError, ValueError, TypeError, ArithmeticError) as error:
        needs = isinstance(error, NotImplementedError) or "meta tensor" in str(error)
        why = "because its operations depend on data" if needs else "because it failed"
        if any(
            str(frame.f_globals.get("__name__")).startswith("liger_kernel") for frame, _ in walk_tb(error.__traceback__)
        ):
            raise UnsupportedError(
                f"Liger has replaced parts of {config.model_type!r} in this process, and its kernels only run on "
                "a GPU. Predict the step before applying Liger, or in another process (`rankpilot memory`)."
            ) from error
        raise UnsupportedError(
            f"A step of {config.model_type!r} cannot be predicted from its configuration, {why} "
            f"({first_line(error)[:120]}). Load the model and measure it with `rankpilot memory`."
        ) from error


def _named(model: PeftModel) -> tuple[str, ...]:
    """Return the names of target modules; empty for a regular expression."""
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
    """Return the model with adapters, in training mode."""
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
    if sees(base.config):
        no_checkpoints_in_towers(base)
    if loaded.input_gradients:
        base.enable_input_require_grads()
    else:
        training_step.release_inputs(model)  # PEFT makes them require gradients again
    return model.train()


def _loss(model: PeftModel, step: StepConfig, loaded: LoadedAs) -> training_step.LossFunction:
    """Return the loss function of a batch in the step's precision."""
    plain = training_step.model_loss(model)
    if loaded.keeps_output:
        model.register_forward_hook(_keep_logits)

    def loss(batch: Any) -> torch.Tensor:
        with autocast_on_meta(torch.bfloat16 if step.bf16 else None):
            return plain(batch)

    return loss


def _keep_logits(model: torch.nn.Module, arguments: Any, output: Any) -> None:
    """Keep the logits alive as long as the loss."""
    if getattr(output, "loss", None) is not None:
        output.loss.kept = output.logits


PEFT_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForImageTextToText": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
"""Classes of transformers for models with a head, and PEFT's `task_type` for each."""


_ENDINGS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def sees(config: PreTrainedConfig) -> bool:
    """Return whether a model of this configuration reads pictures along with texts."""
    return type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def usual_class(config: PreTrainedConfig) -> str:
    """Return the transformers class for a model with its architecture's usual fine-tuning head."""
    kind = type(config)
    for architecture in config.architectures or ():
        for ending, name in _ENDINGS.items():
            if architecture.endswith(ending):
                return name
    if kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "AutoModelForSeq2SeqLM"
    if sees(config) and kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return "AutoModelForImageTextToText"
    reads_one_way = (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    )
    return "AutoModelForCausalLM" if reads_one_way else "AutoModelForSequenceClassification"


def base_on_meta(config: PreTrainedConfig, auto_class: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a configuration's model on the meta device; adjusts the configuration as loading and Trainers do.

    Args:
        config: the configuration.
        auto_class: a key of `PEFT_TYPES`.
        dtype: precision of the weights; by default that of the configuration. Attention by flash_attention_2 or 3, flex
            or a hub kernel is replaced by torch's, which saves as much for the backward pass.

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
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ConfigError(
            f"Cannot create {auto_class} from this configuration of {config.model_type!r}: {said_of(error)}"
        ) from error
    if getattr(config, "scale_decoder_outputs", True) is False:
        # T5 version 1.1: its configuration claims a tied output layer, but its weights are untied.
        base.lm_head.weight = nn.Parameter(torch.empty_like(base.lm_head.weight))
    return base


_WINDOWS = ("sliding_window", "local_attention", "attention_window", "attention_chunk_size")
"""Configuration fields for the largest attention window."""


def _windows(config: PreTrainedConfig) -> list[int]:
    """Return the attention windows of layers that do not attend to all tokens."""
    text = config.get_text_config()
    return [value for name in _WINDOWS if isinstance(value := getattr(text, name, None), int) and value > 0]


def calibration_shape(config: PreTrainedConfig, shape: BatchShape, *, padded: bool, least: int = 0) -> BatchShape:
    """Return a shape at least as large, for which all calibration steps run the same operators as for `shape`.

    Calibration halves lengths. Half the returned length exceeds every attention window that `shape` exceeds. It is a
    multiple of `MASK_ALIGNMENT` with padding, or with a window if `shape` is one, and otherwise neither length is.
    Larger steps are free without contents. If it takes a window that `shape` does not exceed to reach the `least`
    length, this is `shape` itself.
    """
    if any(shape.length < window <= least for window in _windows(config)):
        return shape
    length = max([shape.length, least, *(2 * window for window in _windows(config) if window <= shape.length)])
    if padded or (length > shape.length and shape.length % MASK_ALIGNMENT == 0):
        length += -length % (2 * MASK_ALIGNMENT)
    elif length > shape.length:
        length += (4 - length) % (2 * MASK_ALIGNMENT)
    return BatchShape(max(shape.rows, 4), length)


def batch_on_meta(model: PreTrainedModel, shape: BatchShape) -> dict[str, torch.Tensor]:
    """Return token ids, a mask and labels on the default device; a row classifier's labels have one axis.

    Target texts of an encoder-decoder have the same length.
    """
    tokens = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    name = type(model).__name__
    rows_only = name.endswith("ForSequenceClassification")
    regression = rows_only and model.config.num_labels == 1
    labels = torch.zeros(shape.rows, dtype=torch.float32 if regression else torch.long) if rows_only else tokens.clone()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def batch_with_pictures(
    model: PreTrainedModel, pictures: RowPictures, shape: BatchShape, padded: bool
) -> dict[str, torch.Tensor]:
    """Return a batch on the CPU whose rows begin with their pictures; see `known_contents`.

    Args:
        model: a model of texts and pictures.
        pictures: the pictures of a row.
        shape: rows and tokens of the batch; the tokens include those of pictures.
        padded: whether the last token is padding.

    Raises:
        ConfigError: a row is too short for its pictures.
    """
    check_holds(pictures.tokens, shape.length)
    places, each = torch.arange(shape.length, device="cpu"), pictures.tokens // pictures.images
    marks = ((places < pictures.tokens) & (places % each > 0)).expand(shape.rows, -1)
    token: int = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    ids = marks * token + ~marks * int(token == 0)
    mask = torch.ones_like(ids)
    mask[-1, -1] -= int(padded)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if pictures.types:
        batch[pictures.types] = marks.long()
    for name, tensor in pictures.tensors.items():
        values = torch.tensor(tensor.values, device="cpu")
        sizes = (shape.length if size == LENGTH else size for size in tensor.shape[1:])
        batch[name] = values.expand(shape.rows * tensor.shape[0], *sizes)
    return batch


LEAST = 2
"""Fewest layers to keep: one, and one that reads the output of another."""


def _frozen_towers(base: PreTrainedModel) -> Iterator[nn.ModuleList]:
    """Yield the lists of checkpointable layers outside the language model that hold no adapter."""
    texts = {id(module) for module in base.get_decoder().modules()}
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in texts and _is_frozen(module):
            yield module


def _is_frozen(layers: nn.ModuleList) -> bool:
    trained = any(parameter.requires_grad for parameter in layers.parameters())
    return not trained and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers) and len(layers) > 0


def no_checkpoints_in_towers(base: PreTrainedModel) -> None:
    """Turn gradient checkpointing off in frozen towers, for recordings to count only layers on which it has effects."""
    for layer in (layer for layers in _frozen_towers(base) for layer in layers):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False


@contextmanager
def towers_cut(base: PreTrainedModel) -> Iterator[None]:
    """Cut frozen towers to their first layers of all kinds inside the context."""
    with ExitStack() as stack:
        for layers in list(_frozen_towers(base)):
            stack.enter_context(_cut(layers, _layers_of_all_kinds(base)))
        yield


def _layers_of_all_kinds(base: PreTrainedModel) -> int:
    """Return the number of first layers that include one with full attention, and all whose outputs are kept."""
    sight = base.config.vision_config
    names = "fullatt_block_indexes", "deepstack_visual_indexes", "intermediate_layers_indices"
    full, *kept = (getattr(sight, name, None) or () for name in names)
    return max(LEAST, 1 + min(full, default=0), *(1 + max(each, default=0) for each in kept))


@contextmanager
def _cut(layers: nn.ModuleList, count: int) -> Iterator[None]:
    rest = list(layers)[count:]
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(rest)
