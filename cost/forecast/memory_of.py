"""Predict the memory of a LoRA fine-tune on a card, from the model's name or configuration.

torch and transformers are only imported when no recorded file has the answer (`cost/forecast/stored_step.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ...common.checks import is_count
from ...common.errors import ConfigError, UnknownNameError, naming_extras, shown
from ...common.files import cache_folder, expanded, from_json, read_object
from ...lora.spec import REFERENCE_RANK, check_rank
from ..cards import DeviceSpec, find_device_spec
from ..step_config import StepConfig, check_dropout, check_length
from .configured_step import DTYPES, ConfiguredStep, Implementation, LoadedAs, Sharding, Shards
from .known_models import check_known, published_models, short_name
from .of_targets import OfTargets, places_of
from .outlook import Outlook
from .pictures import check_holds
from .stored_step import StepFile, StoredStep, step_key, versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .from_config import StepRecorder

_OF_LOAD = {each.name for each in fields(LoadedAs)} - {"device", "dtype", "attention", "padded", "implementation"}
"""Settings of `LoadedAs` accepted by `memory_of` by name."""


def _dtype_on(card: DeviceSpec, dtype: str | None) -> str:
    """Return the requested precision after validating it, or the card's default."""
    dtype = ("bf16" if card.has_bf16 else "fp16") if dtype is None else dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    return dtype


def memory_of(
    model: str | PreTrainedConfig,
    card: str,
    *,
    rank: int = REFERENCE_RANK,
    dtype: str | None = None,
    padded: bool = False,
    gpus: int = 1,
    sharding: Sharding = "ddp",
    attention: Implementation | Literal["math"] | None = None,
    lora_dropout: float = 0.0,
    **settings: Any,
) -> Outlook:
    """Predict the memory of a LoRA fine-tune on a card, from the model's configuration alone.

    Args:
        model: a short name ("qwen3-8b"), a Hugging Face id, a folder or config.json, or a configuration object.
        card: a card of the table ("RTX 4090") or a memory size ("24GiB").
        rank: rank of every target module, capped at the module's width.
        dtype: precision of the frozen model, "bf16", "fp16" or "fp32"; by default bf16 if the card supports it, else
            fp16. With bf16, steps run under bf16 autocast.
        padded: whether batches contain padded rows, which need other attention kernels.
        gpus: number of cards that train together, each with its own batch; all figures are per card.
        sharding: what the cards share: "ddp", "zero2", "fsdp2" or "zero3"; see `Shards`.
        attention: "eager", "sdpa", "flash" or "flex"; or "math", sdpa without a fused kernel.
        lora_dropout: see `peft.LoraConfig`.
        settings: further settings of `LoadedAs`: experts, loss, reentrant, packed, stream, adapter, image ...; and of
            `StepConfig`: batch_size, max_length, quantization, optimizer ... Sizes default to those of the commands.

    Returns:
        The outlook; its `best`, `choices` and `grid` are computed lazily.

    Raises:
        UnknownNameError, AssetError: there is no such model, card or setting.
        ConfigError: a setting is out of range, rows exceed the model's positions, no module is as wide as the rank, or
            the model does not read tokens.
        UnsupportedError: the model's step cannot be predicted.

    Example:
        >>> rankpilot.memory_of("qwen3-8b", "24GiB", quantization="nf4", batch_size=4).as_asked  # doctest: +SKIP
    """
    spec, shards = find_device_spec(card), Shards(gpus, sharding)
    dtype = _dtype_on(spec, dtype)
    of_load = {name: settings.pop(name) for name in _OF_LOAD & set(settings)}
    _check(rank, attention, settings)
    check_dropout(lora_dropout)
    adapter = _adapter(of_load.pop("adapter", {})) | ({"lora_dropout": lora_dropout} if lora_dropout else {})
    rollouts = of_load.pop("rollouts", None)
    loaded = replace(
        from_json(LoadedAs, {"padded": padded} | of_load),
        rollouts=rollouts,
        dtype=dtype,
        attention="math" if attention == "math" else "auto" if spec.has_flash_attention else "efficient",
        implementation=None if attention == "math" else attention,
        adapter=adapter,
    )
    asked = AskedStep(model, from_json(StepConfig, {"bf16": dtype == "bf16"} | settings), loaded)
    configured, step = asked.configured()
    check_rank(rank, configured.targets)
    return Outlook(configured, rank, step, card=spec, dtype=dtype, shards=shards)


def _check(rank: object, attention: object, settings: Mapping[str, Any]) -> None:
    """Raise UnknownNameError or ConfigError for an invalid step setting, rank or attention implementation."""
    if attention not in (None, "math", *get_args(Implementation)):
        raise UnknownNameError.of("attention", attention, ("math", *get_args(Implementation)))
    known = {each.name for each in fields(StepConfig)}
    for name in settings:
        if name not in known:
            raise UnknownNameError.of("setting of a step", name, known | _OF_LOAD)
    if not is_count(rank):
        raise ConfigError(f"rank must be a whole number of at least 1; got {shown(rank)}.")


def _adapter(given: object) -> dict[str, Any]:
    """Return extra arguments of `peft.LoraConfig`, refusing those set through the step's settings."""
    own = {"target_modules", "target_parameters", "task_type"}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name not in own for name in given):
        told = f"adapter must contain arguments of peft.LoraConfig by name, except {', '.join(sorted(own))}"
        raise ConfigError(f"{told}; got {shown(given)}.")
    return dict(given)


@dataclass(frozen=True)
class AskedStep:
    """The parts of a requested step with an effect on its recording.

    Attributes:
        model: see `memory_of`.
        settings: settings of the step; batch, optimizer and checkpointing do not affect the recording.
        loaded: how the model is loaded.
    """

    model: str | PreTrainedConfig
    settings: StepConfig
    loaded: LoadedAs = field(default_factory=lambda: LoadedAs(dtype="bf16"))

    @property
    def key(self) -> str:
        """Return the key of the step's file; settings at their defaults are left out."""
        usual = asdict(LoadedAs())
        loaded = {name: value for name, value in asdict(self._recorded).items() if value != usual[name]}
        step = {name: getattr(self.settings, name) for name in _RECORDED}
        return step_key(_fields(self.model), loaded | step)

    @property
    def _recorded(self) -> LoadedAs:
        """Return how the model is loaded, without settings irrelevant to a recording."""
        adapter = self.loaded.adapter
        if adapter.get("lora_dropout"):  # regardless of the rate
            adapter = {**adapter, "lora_dropout": 0.05}
        loss = "cut" if self.loaded.loss == "liger" else self.loaded.loss
        usual = {name: getattr(LoadedAs(), name) for name in _AFTER_RECORDING}
        return replace(self.loaded, **usual, loss=loss, adapter=adapter)

    def configured(self) -> tuple[ConfiguredStep, StepConfig]:
        """Return the step and its settings, with default sizes filled in."""
        source = self.stored()
        model = source.model
        step = self.settings.sized(continues=model.continues, positions=model.positions)
        if not self.loaded.packed:
            check_length(step.max_length, model.positions)
        if self.loaded.image:
            check_holds(model.picture_tokens, step.max_length)
        found = source.configured(step)
        if step.gradient_checkpointing is True and not found.memory.segments:
            self.recorder(optional=False)  # raises, since the model has no layers to checkpoint
        return self._with_what_is_said(found), step

    def _with_what_is_said(self, found: ConfiguredStep) -> ConfiguredStep:
        """Add the facts only found in the model's configuration."""
        said = _fields(self.model)
        model = replace(found.model, words=words_of(said), own_code=bool(said.get("auto_map")), config=said)

        def leaner() -> ConfiguredStep | None:
            lean = found.leaner()
            return lean and replace(lean, model=model)

        return replace(found, model=model, leaner=leaner)

    def stored(self) -> StoredStep:
        """Return the step, read from existing files where possible."""
        key = self.key
        path = cache_folder() / "steps" / f"{key}.xz"
        file = StepFile.read(path, key)
        if file is None or file.text["versions"] != versions():
            file = StepFile.read(shipped(self.model), key)
        if file is None and (step := self._of_all_linear()):
            return step
        return StoredStep(file or StepFile(key), self.recorder, path, self.loaded)

    def _of_all_linear(self) -> StoredStep | None:
        """Return the step for a subset of modules, derived from the all-linear recording if there is one."""
        usual = self.settings.target_modules == "all-linear" or self.settings.target_parameters or self.loaded.image
        if usual or self.loaded.adapter.get("use_dora"):  # DoRA holds magnitudes for other modules too
            return None
        whole = replace(self, settings=replace(self.settings, target_modules="all-linear"))
        if "model" not in (step := whole.stored()).file.parts:
            return None
        targets = step.model.targets
        places = places_of(self.settings.target_modules, targets)
        return None if places is None else step.of(OfTargets(places, len(targets)))

    def recorder(self, *, optional: bool = True) -> StepRecorder:
        """Return a recorder with every layer checkpointed; `optional` skips this if the model does not support it."""
        with naming_extras():
            from .from_config import StepRecorder

        step = replace(self.settings, gradient_checkpointing=True)
        return StepRecorder(self.model, step, self._recorded, checkpointing_optional=optional)


_AFTER_RECORDING = (
    "offload", "expandable_segments", "stream", "eval_batch_size", "eval_length", "eval_packed", "keep_logits",
    "rollouts",
)  # fmt: skip
"""Settings of `LoadedAs` without an effect on a recording."""

_RECORDED = ("quantization", "prepare_kbit", "target_modules", "target_parameters", "bf16")


def shipped(model: str | PreTrainedConfig) -> Path:
    """Return the path of the shipped file for a known model and others with the same architecture."""
    name = short_name(model) if isinstance(model, str) else None
    built = published_models()[name]["config"] if name else {}
    layers = built.get("num_hidden_layers", built.get("num_layers"))
    return Path(__file__).with_name("recorded") / f"{built.get('model_type')}-{layers}.xz"


def words_of(fields: Mapping[str, Any]) -> int:
    """Return the vocabulary size in a model's configuration; 0 if not given."""
    return int(fields.get("vocab_size") or (fields.get("text_config") or {}).get("vocab_size") or 0)


def _fields(model: str | PreTrainedConfig) -> Mapping[str, Any]:
    """Return the fields of a model's configuration, without transformers if a file or the table has them."""
    if not isinstance(model, str):
        from transformers import PreTrainedConfig

        if not isinstance(model, PreTrainedConfig):
            raise ConfigError(f"model must be a name, a path or a transformers configuration; got {shown(model)}.")
        return _plain(model)
    check_known(model)
    path = expanded(model)
    if not path.exists() and (short := short_name(model)):
        fields: Mapping[str, Any] = published_models()[short]["config"]
        return fields
    with suppress(OSError, ValueError):
        if place := path if path.exists() else _downloaded(model):
            file = place / "config.json" if place.is_dir() else place
            if file.is_file():  # not a pipe, which could block forever
                return read_object(file)
    from .published import find_configuration

    return _plain(find_configuration(model))  # downloads it, or raises a precise error


def _plain(config: PreTrainedConfig) -> Mapping[str, Any]:
    from .published import UNUSABLE, unusable

    try:
        fields: Mapping[str, Any] = config.to_dict()
    except UNUSABLE as error:
        raise unusable(str(config.name_or_path or type(config).__name__), error) from error
    return fields


def _downloaded(name: str) -> Path | None:
    """Return the path of a Hugging Face id's configuration in the hub cache, or None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
