"""What a LoRA fine-tune takes on a card, asked by the model's name or configuration.

torch and transformers are loaded only for what no file tells (`cost/stored_step.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.checks import is_count
from ..common.files import cache_folder, read_object
from ..errors import ConfigError, UnknownNameError, shown
from ..lora.spec import REFERENCE_RANK, check_rank
from .cards import find_device_spec
from .configured_step import Sharding, Shards
from .known_models import check_known, published_models, short_name
from .outlook import Outlook
from .step_config import Attention, StepConfig, check_length
from .stored_step import StepFile, StoredStep, step_key, versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .from_config import StepRecorder

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
    if not is_count(rank):
        raise ConfigError(f"rank is at least 1, a whole number; got {shown(rank)}.")
    attention: Attention = "auto" if spec.has_flash_attention else "efficient"
    step = StepConfig(**{"bf16": dtype == "bf16"} | settings)
    asked = AskedStep(model=model, settings=step, dtype=dtype, attention=attention, padded=padded)
    source = asked.stored()
    step = step.sized(continues=source.model.continues, positions=source.model.positions)
    check_length(step.max_length, source.model.positions)
    check_rank(rank, source.model.targets)
    configured = source.configured(step)
    if step.gradient_checkpointing is True and not configured.memory.segments:
        asked.recorder(optional=False)  # which tells that the model has none
    return Outlook(configured, rank, step, card=spec, dtype=dtype, shards=shards)


@dataclass(frozen=True, kw_only=True)
class AskedStep:
    """A step as far as its recording depends on it.

    Attributes:
        model: see `memory_of`.
        settings: of the step; the batch, the optimizer and checkpointing do not matter.
        dtype: of the frozen model.
        attention: which kernels the card has.
        padded: whether rows are padded.
    """

    model: str | PreTrainedConfig
    settings: StepConfig
    dtype: str = "bf16"
    attention: Attention = "auto"
    padded: bool = False

    @property
    def key(self) -> str:
        """The key of its file."""
        settings = {name: getattr(self.settings, name) for name in _RECORDED}
        own = {"dtype": self.dtype, "attention": self.attention, "padded": self.padded}
        return step_key(_fields(self.model), settings | own)

    def stored(self) -> StoredStep:
        """The step, from the files that are there."""
        key = self.key
        path = cache_folder() / "steps" / f"{key}.xz"
        file = StepFile.read(path, key)
        if file is None or file.text["versions"] != versions():
            file = StepFile.read(shipped(self.model, self.settings), key) or StepFile(key)
        return StoredStep(file, self.recorder, path)

    def recorder(self, *, optional: bool = True) -> StepRecorder:
        """What records the step with all layers checkpointed; with `optional`, with none where the model cannot."""
        import torch

        from .from_config import LoadedAs, StepRecorder

        types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        loaded = LoadedAs(dtype=types[self.dtype], attention=self.attention, padded=self.padded)
        step = replace(self.settings, gradient_checkpointing=True)
        return StepRecorder(self.model, step, loaded, checkpointing_optional=optional)


_RECORDED = ("quantization", "prepare_kbit", "target_modules", "bf16")


def shipped(model: str | PreTrainedConfig, settings: StepConfig) -> Path:
    """The file that ships for a model that is known by name, if any does."""
    name = short_name(model) if isinstance(model, str) else ""
    return Path(__file__).with_name("recorded") / f"{name or 'unknown'}-{settings.quantization}.xz"


def _fields(model: str | PreTrainedConfig) -> Mapping[str, Any]:
    """The fields of a model's configuration, read without transformers where a file or the table has them."""
    if not isinstance(model, str):
        from transformers import PreTrainedConfig

        if not isinstance(model, PreTrainedConfig):
            raise ConfigError(f"model is a name, a path or a transformers configuration; got {shown(model)}.")
        return _plain(model)
    check_known(model)
    path = Path(model).expanduser()
    if not path.exists() and (short := short_name(model)):
        fields: Mapping[str, Any] = published_models()[short]["config"]
        return fields
    with suppress(OSError, ValueError):
        if place := path if path.exists() else _downloaded(model):
            return read_object(place / "config.json" if place.is_dir() else place)
    from .published import find_configuration

    return _plain(find_configuration(model))  # which downloads it, or tells what is wrong


def _plain(config: PreTrainedConfig) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = config.to_dict()
    return fields


def _downloaded(name: str) -> Path | None:
    """The configuration of a Hugging Face id in the cache of its library; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
