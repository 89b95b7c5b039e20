"""What a LoRA fine-tune takes on a card, asked by the model's name or configuration."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..common.checks import is_count
from ..errors import ConfigError, UnknownNameError, shown
from ..lora.spec import REFERENCE_RANK, check_rank
from .cards import find_device_spec
from .configured_step import Sharding, Shards
from .outlook import Outlook
from .published import find_configuration, positions_of
from .step_config import Attention, StepConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("bf16", "fp16", "fp32")
"""Precisions in which a frozen model can be loaded."""


def memory_of(
    model: str | PreTrainedConfig,
    card: str,
    *,
    rank: int = REFERENCE_RANK,
    dtype: str | None = None,
    padded: bool = False,
    gpus: int = 1,
    sharding: Sharding = "ddp",
    **settings: Any,
) -> Outlook:
    """What a LoRA fine-tune of a model takes on a card, from its configuration alone.

    Args:
        model: a short name ("qwen3-8b"), a Hugging Face id, a folder or a config.json, or a configuration.
        card: a card of the table ("RTX 4090") or its memory ("24GiB").
        rank: on all modules; a module that is narrower has its own width.
        dtype: of the frozen model: "bf16", "fp16" or "fp32"; by default bf16 where the card has it, else fp16. Steps
            compute under bf16 autocast with bf16.
        padded: whether rows of a batch are padded, which takes other attention kernels.
        gpus: how many such cards train together, each with its own batch; figures are of one.
        sharding: what they share: "ddp", "fsdp2" or "zero3"; see `Shards`.
        settings: of `StepConfig`: batch_size, max_length, quantization, optimizer, target_modules, accumulation,
            gradient_checkpointing (of all layers, of none, or "auto": as few as fit). The usual sizes are those of
            `rankpilot finetune` and `rankpilot memory`.

    Returns:
        The outlook: `best`, `choices` and `grid`, computed when they are asked for.

    Raises:
        UnknownNameError, AssetError: there is no such model, card or setting.
        ConfigError: a setting is out of range, a row is longer than the model has positions, no module is as wide as
            the rank, or the model reads no tokens.
        UnsupportedError: the model's step cannot be predicted.

    Example:
        >>> rankpilot.memory_of("qwen3-8b", "24GiB", quantization="nf4", batch_size=4).best  # doctest: +SKIP
    """
    spec, shards = find_device_spec(card), Shards(gpus, sharding)
    dtype = dtype or ("bf16" if spec.has_bf16 else "fp16")
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    known = {each.name for each in fields(StepConfig)}
    for name in settings:
        if name not in known:
            raise UnknownNameError.of("setting of a step", name, known)
    import torch
    from transformers import PreTrainedConfig

    from .from_config import LoadedAs, from_config, usual_class

    config = find_configuration(model) if isinstance(model, str) else model
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"model is a name, a path or a transformers configuration; got {shown(model)}.")
    step = StepConfig(**{"bf16": dtype == "bf16"} | settings)
    step = step.sized(continues=usual_class(config) == "AutoModelForCausalLM", positions=positions_of(config))
    if not is_count(rank):
        raise ConfigError(f"rank is at least 1, a whole number; got {shown(rank)}.")
    attention: Attention = "auto" if spec.has_flash_attention else "efficient"
    loaded = LoadedAs(
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype],
        attention=attention,
        padded=padded,
    )
    recorded, optional = replace(step, gradient_checkpointing=True), step.gradient_checkpointing is not True
    configured = from_config(config, recorded, loaded, counted=True, checkpointing_optional=optional)
    check_rank(rank, configured.targets)
    return Outlook(configured, rank, step, card=spec, dtype=dtype, shards=shards)
