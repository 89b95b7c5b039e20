"""The memory of a training step from a model's configuration alone: no weight is loaded or allocated.

The model is made on the meta device, where tensors have shapes and no contents, and the package's own calibration runs
its small steps there, as the device that is asked about would run them (`memory/hollow/`). The byte model that comes
out is the one that the same steps give on that device.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, RankPilotError, UnsupportedError, first_line
from ..lora.fresh import fresh_adapters, head_names
from ..lora.targets import TargetModule, find_target_modules
from .batch_shape import BatchShape
from .breakdown import frozen_bytes
from .device_kind import DeviceKind
from .device_table import WORKSPACE_BYTES
from .find_configuration import find_configuration
from .for_training import measure_memory
from .hollow.attention import Attention
from .hollow.base import PEFT_TYPES, hollow_base, usual_class
from .hollow.batch import calibration_shape, hollow_batch
from .hollow.device import HollowDevice, hollow_autocast, hollow_device
from .hollow.quantised import quantise, quiet
from .model import MemoryModel
from .step_config import StepConfig
from .step_parts import has_checkpointing, new_optimizer, release_inputs, switch_checkpointing
from .step_work import StepWork
from .text_models import check_length, check_reads_tokens, most_positions
from .training_step import LossFunction, TrainingStep, model_loss
from .work_counter import count_work

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
    """

    memory: MemoryModel
    model: PeftModel = field(repr=False)
    targets: list[TargetModule] = field(repr=False)
    parameters: int
    frozen_bytes: int
    workspace_bytes: int
    positions: int | None
    work: StepWork | None = field(repr=False)


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
        step: batch, length, target modules, optimiser, quantisation, autocast, checkpointing.
        loaded: how the model is loaded, and on which device; by default on CUDA as it was saved.
        counted: also count what the step computes, operator by operator, on a small batch of the same length.
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
    loaded = loaded or LoadedAs()
    auto_class = usual_class(config)
    device = HollowDevice(loaded.device, loaded.attention, loaded.padded)
    with hollow_device(device), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about contents that are not there
        base = hollow_base(config, auto_class, loaded.dtype)
        check_length(step.max_length, base)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        if checkpointing_optional and not has_checkpointing(base):
            step = replace(step, checkpointing=False)
        positions, kind = most_positions(base), PEFT_TYPES[auto_class]
        model = _adapted(_quantised(base, step, loaded, kind), step, loaded, kind)
        targets = find_target_modules(model)
        memory, work = _recorded(model, base, targets, step, loaded, counted=counted)
        return ConfiguredStep(
            memory=memory,
            model=model,
            targets=targets,
            parameters=parameters,
            frozen_bytes=frozen_bytes(model),
            workspace_bytes=2 * WORKSPACE_BYTES if loaded.device == "cuda" else 0,
            positions=positions,
            work=work,
        )


def _recorded(
    model: PeftModel,
    base: PreTrainedModel,
    targets: list[TargetModule],
    step: StepConfig,
    loaded: LoadedAs,
    *,
    counted: bool,
) -> tuple[MemoryModel, StepWork | None]:
    """The byte model of a step of the model, and what it computes if that is counted."""
    config, shape = base.config, BatchShape(step.batch_size, step.max_length)
    with torch.device("cpu"):  # an 8-bit optimiser makes the table of its codes
        optimizer = new_optimizer(step.optimizer, model)
    training = TrainingStep(model, _loss(model, step, loaded), optimizer, accumulates=step.accumulation > 1)
    batch = hollow_batch(base, calibration_shape(config, shape, padded=loaded.padded))
    try:
        memory = measure_memory(training, targets, batch, signals=False)
        work = count_work(model, targets, training.loss, batch) if counted else None
    except RankPilotError:
        raise
    except AttributeError as error:
        raise ConfigError(f"The configuration lacks what its model needs: {first_line(error)}") from error
    except (RuntimeError, NotImplementedError, ValueError, TypeError, ArithmeticError) as error:
        raise _unpredictable(config, error) from error
    return replace(memory, shape=shape), work


def _quantised(base: PreTrainedModel, step: StepConfig, loaded: LoadedAs, kind: str) -> PreTrainedModel:
    if step.quantization == "none":
        return base
    return quantise(
        base,
        step.quantization,
        double_quantization=loaded.double_quantization,
        kept=head_names(base) if kind in _NEW_HEADS else None,
    )


def _adapted(base: PreTrainedModel, step: StepConfig, loaded: LoadedAs, kind: str) -> PeftModel:
    """The model with adapters, in the mode in which it trains."""
    if step.checkpointing:
        switch_checkpointing(base, True, reentrant=loaded.reentrant)
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
        release_inputs(model)  # PEFT makes them require gradients again
    return model.train()


def _loss(model: PeftModel, step: StepConfig, loaded: LoadedAs) -> LossFunction:
    """The loss of a batch under the step's precision."""
    plain = model_loss(model)
    if loaded.keeps_output:
        model.register_forward_hook(_keep_logits)

    def loss(batch: Any) -> torch.Tensor:
        with hollow_autocast(torch.bfloat16 if step.bf16 else None):
            return plain(batch)

    return loss


def _keep_logits(model: torch.nn.Module, arguments: Any, output: Any) -> None:
    """Let the loss keep the logits alive."""
    if getattr(output, "loss", None) is not None:
        output.loss.kept = output.logits


def _unpredictable(config: PreTrainedConfig, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"A step of {config.model_type!r} cannot be predicted from its configuration, because what it computes depends "
        f"on contents ({first_line(error)[:120]}). Load the model, and measure it with `rankpilot memory`."
    )
