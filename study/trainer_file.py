"""Settings of `rankpilot memory` from the file with which another program trains: axolotl, TRL or LLaMA-Factory.

The file is read as it is. What decides bytes is translated, with that program's own defaults; what decides none, such
as data and rates, is passed over; what is not understood is told by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..common.files import MOST_YAML_BYTES, parse_yaml, read_text
from ..errors import ConfigError, shown


@dataclass(frozen=True)
class TrainerFile:
    """What a file says.

    Attributes:
        program: whose it is.
        settings: by name, of `MemoryConfig`.
        unread: keys that are not understood, so that what they do is not counted.
    """

    program: str
    settings: dict[str, Any]
    unread: tuple[str, ...]


def read_trainer_file(path: str | Path) -> TrainerFile:
    """Read a YAML file of axolotl, TRL or LLaMA-Factory.

    Raises:
        ConfigError: it is missing, no YAML, of another program, or of a training that is not LoRA on one language
            model.
    """
    try:
        values = parse_yaml(read_text(Path(path), MOST_YAML_BYTES))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} holds no settings by name: {shown(values)}.")
    program = _program(values)
    if not program:
        raise ConfigError(
            f"{path} is no file of axolotl (base_model), TRL (model_name_or_path) or LLaMA-Factory (model_name_or_path "
            f"and finetuning_type). It has: {', '.join(map(shown, list(values)[:5]))}."
        )
    keys = _Keys({key: value for key, value in values.items() if value is not None}, str(path))
    settings = _READERS[program](keys) | {"exact_savers": False}
    if settings.get("quantization"):
        settings["prepare_kbit"] = False  # all three keep norms and embeddings in 16 bits
    unread = tuple(key for key in keys.left() if not _HARMLESS.fullmatch(key))
    return TrainerFile(program, {name: value for name, value in settings.items() if value is not None}, unread)


def _program(values: Mapping[str, Any]) -> str:
    if "base_model" in values:
        return "axolotl"
    if "model_name_or_path" in values or "per_device_train_batch_size" in values:
        return "LLaMA-Factory" if {"finetuning_type", "stage", "cutoff_len"} & set(values) else "TRL"
    return ""


_HARMLESS = re.compile(
    r"(dataset|data_|wandb|mlflow|comet|trackio|swanlab|ray_|hub|push_to|save|load_best|eval|val_|test_|log|report|lr_|"
    r"warmup|learning_rate|num_|max_steps|max_grad|max_samples|weight_decay|adam|chat_template|tokenizer|special|tokens|"
    r"output|overwrite|resume|preproc|train_on|template|seed|shuffle|dataloader|pad|strict|plugins|saves|evals|early|"
    r"debug|tf32|ddp|group_by|local_rank|xformers|trust|remove_unused|do_|cosine|loss_watchdog|excess|image|"
    r"skip_|is_|eot|default|additional_special|unfrozen|s2_|lora_(alpha|model_dir|fan|on_cpu|mlp|qkv|o_|emb)|loraplus|"
    r"model_(type|config|revision)|revision|type_of|bnb_config|experimental|low_cpu|run_name|disable_|plot|cache|stage|"
    r"enable_thinking|assistant_only|completion_only|eos_token|formatting|use_(kernels|fast|cache)|script|max_length_"
    r"|streaming|packing_strategy|include_|ignore|neftune|average|label_names|optim_args|bf16_full).*"
)
"""Keys that decide no bytes, or none that another key has not decided."""


class _Keys:
    """The settings of a file, which knows those that were not asked for."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self.values, self.path, self._asked = values, path, set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        self._asked.add(name)
        return self.values.get(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch, which may be "auto" or a word for what is switched on."""
        value = self.get(name, default)
        return value.lower() not in ("false", "no", "none", "") if isinstance(value, str) else bool(value)

    def number(self, name: str, default: float) -> Any:
        """A number from 0 on; it may be written as text (2e-4)."""
        value = self.get(name, default)
        try:
            found = type(default)(value)
        except (TypeError, ValueError, OverflowError):
            found = type(default)(-1)
        if isinstance(value, bool) or found < 0:
            raise ConfigError(f"{self.path}: {name} is a number from 0 on; got {shown(value)}.")
        return found

    def model(self, name: str) -> str | None:
        """The name of the model; None where the command line has to give it."""
        value = self.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{self.path}: {name} is the name of a model or a folder; got {shown(value)}.")
        return value

    def left(self) -> list[str]:
        """Keys that nobody asked for."""
        return [key for key in self.values if key not in self._asked]

    def refuse(self, what: str) -> ConfigError:
        """The error for a training that cannot be priced."""
        return ConfigError(f"{self.path} {what}. rankpilot prices LoRA and QLoRA of a language model.")


_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw", "adam"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "ademamix_8bit", "adamw8bit"), "adamw8bit"),
    **dict.fromkeys(("paged_adamw_8bit",), "paged_adamw8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "adamw"),
    **dict.fromkeys(("adamw_torch_4bit", "ao_adamw_4bit"), "adamw4bit"),
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def _optimizer(keys: _Keys, name: str, default: str) -> str:
    given = str(keys.get(name, default)).lower()
    if given not in _OPTIMIZERS:
        near = difflib.get_close_matches(given, _OPTIMIZERS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(_OPTIMIZERS))}."
        raise ConfigError(f"{keys.path}: the optimizer {shown(given)} is not one whose bytes are known.{hint}")
    return _OPTIMIZERS[given]


def _attention(given: Any) -> str | None:
    """`MemoryConfig.attention` for a name of an implementation."""
    name = str(given or "").lower()
    for part, found in (("flash", "flash"), ("fa2", "flash"), ("fa3", "flash"), ("flex", "flex"), ("sage", "flash")):
        if part in name:
            return found
    return {"eager": "eager", "disabled": "eager", "sdpa": "sdpa", "xformers": "sdpa"}.get(name)


def _names(given: Any) -> str | None:
    """Names of modules as one text, or a regular expression as it is."""
    return ",".join(map(str, given)) if isinstance(given, list) else None if given is None else str(given)


def _adapter(keys: _Keys, **names: str) -> dict[str, Any]:
    """Further arguments of `LoraConfig`, by the keys that the program has for them."""
    found = {name: value for name, key in names.items() if (value := keys.get(key))}
    saved = found.get("modules_to_save", "")
    if not isinstance(saved, str) and not (isinstance(saved, list) and all(isinstance(each, str) for each in saved)):
        raise ConfigError(f"{keys.path}: {names['modules_to_save']} is names of modules; got {shown(saved)}.")
    return {
        name: value.split(",") if name == "modules_to_save" and isinstance(value, str) else value
        for name, value in found.items()
    }


def _quantization(keys: _Keys) -> str | None:
    """How the frozen model is stored.

    Raises:
        ConfigError: both of two ways are asked for.
    """
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if four and eight:
        raise ConfigError(f"{keys.path} has load_in_4bit and load_in_8bit: set one of them.")
    return "nf4" if four else "int8" if eight else None


def _rows(keys: _Keys, batch: str, default: int, length: int, *, flat: bool) -> dict[str, Any]:
    """The shape of a batch; packed rows of a batch become one where a kernel tells texts apart."""
    rows = keys.number(batch, default)
    shape = {"batch_size": 1, "max_length": rows * length} if flat else {"batch_size": rows, "max_length": length}
    return shape | {"packed": flat, "accumulation": keys.number("gradient_accumulation_steps", 1)}


def _checkpointing(keys: _Keys, on: bool, reentrant: bool) -> dict[str, Any]:
    given = keys.get("gradient_checkpointing_kwargs") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{keys.path}: gradient_checkpointing_kwargs are settings by name; got {shown(given)}.")
    return {"gradient_checkpointing": on, "reentrant": on and bool(given.get("use_reentrant", reentrant))}


def _sharding(keys: _Keys) -> str | None:
    """What several GPUs share, which a number of them has to be given for."""
    deepspeed = keys.get("deepspeed")
    if "fsdp_config" in keys.values or keys.get("fsdp"):
        keys.get("fsdp_config"), keys.get("fsdp_version")
        return "fsdp2"
    stages = re.findall(r"zero_?(?:stage)?(\d)", str(deepspeed).lower())
    return next((f"zero{stage}" for stage in ("3", "2") if stage in stages), None)


def _axolotl(keys: _Keys) -> dict[str, Any]:
    adapter, rl = keys.get("adapter"), keys.get("rl")
    if adapter not in ("lora", "qlora"):
        raise keys.refuse(f"trains {'everything' if adapter is None else f'with adapter: {shown(adapter)}'}")
    if rl:
        raise keys.refuse(f"trains by rl: {shown(rl)}")
    plugins = str(keys.get("plugins", ""))
    cut = keys.flag("cut_cross_entropy", "CutCrossEntropy" in plugins) or keys.flag("liger_fused_linear_cross_entropy")
    flags = [name for name in ("flash", "sdp", "flex", "eager", "xformers") if keys.flag(f"{name}_attention")]
    attention = _attention(keys.get("attn_implementation") or (flags[0].replace("sdp", "sdpa") if flags else None))
    packs = keys.flag("sample_packing") and attention in ("flash", "flex", None)
    offload = keys.get("activation_offloading", False) not in (False, "false")
    checkpointed = keys.flag("gradient_checkpointing")
    if str(keys.values.get("gradient_checkpointing")).startswith("offload"):
        offload = True
    linear = keys.flag("lora_target_linear")
    named = _names(keys.get("lora_target_modules"))
    precise = keys.flag("bf16", True) or keys.flag("bfloat16")
    return {
        "model": keys.model("base_model"),
        "rank": keys.number("lora_r", 8),
        "lora_dropout": keys.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if linear else named or None,
        "target_parameters": _names(keys.get("lora_target_parameters")),
        "adapter": _adapter(keys, use_dora="peft_use_dora", modules_to_save="lora_modules_to_save"),
        "quantization": _quantization(keys),
        "experts": "axolotl" if keys.flag("quantize_moe_experts") else None,
        "optimizer": _optimizer(keys, "optimizer", "adamw_torch_fused"),
        "dtype": "bf16" if precise else "fp16" if keys.flag("fp16") else "fp32",
        "attention": attention,
        "loss": "cut" if cut else None,
        "expandable_segments": True,
        **_rows(keys, "micro_batch_size", 1, keys.number("sequence_len", 2048), flat=packs),
        **_checkpointing(keys, checkpointed, True),
        "offload": offload,
        "sharding": _sharding(keys),
    }


def _trl(keys: _Keys) -> dict[str, Any]:
    if "use_peft" in keys.values and not keys.flag("use_peft"):
        raise keys.refuse("trains everything (use_peft: false)")
    quantization = _quantization(keys)
    keys.flag("use_peft"), keys.get("bnb_4bit_quant_type")
    attention = _attention(keys.get("attn_implementation"))
    flat = attention == "flash" and (keys.flag("packing") or keys.flag("padding_free"))
    keys.flag("packing"), keys.flag("padding_free"), keys.get("torch_dtype")
    return {
        "model": keys.model("model_name_or_path"),
        "rank": keys.number("lora_r", 16),
        "lora_dropout": keys.number("lora_dropout", 0.05 if "lora_target_parameters" not in keys.values else 0.0),
        "target_modules": _names(keys.get("lora_target_modules")) or "q_proj,v_proj",
        "target_parameters": _names(keys.get("lora_target_parameters")),
        "adapter": _adapter(keys, use_dora="use_dora", modules_to_save="lora_modules_to_save"),
        "quantization": quantization,
        "double_quantization": keys.flag("use_bnb_nested_quant") if quantization == "nf4" else None,
        "optimizer": _optimizer(keys, "optim", "adamw_torch_fused"),
        "dtype": {"float32": "fp32", "float16": "fp16"}.get(str(keys.get("dtype", "bfloat16")), "bf16"),
        "bf16": keys.flag("bf16", not keys.flag("fp16")),
        "attention": attention,
        "loss": "chunked" if keys.get("loss_type", "nll") in ("nll", "chunked_nll") else None,
        **_rows(keys, "per_device_train_batch_size", 8, keys.number("max_length", 1024), flat=flat),
        **_checkpointing(keys, keys.flag("gradient_checkpointing", True), False),
        "offload": keys.flag("activation_offloading"),
        "sharding": _sharding(keys),
    }


def _llama_factory(keys: _Keys) -> dict[str, Any]:
    kind, stage = keys.get("finetuning_type", "lora"), keys.get("stage", "sft")
    if kind != "lora":
        raise keys.refuse(f"trains with finetuning_type: {shown(kind)}")
    if stage not in ("sft", "pt"):
        raise keys.refuse(f"trains in stage: {shown(stage)}")
    bits, target = keys.number("quantization_bit", 0), _names(keys.get("lora_target", "all"))
    flash = _attention(keys.get("flash_attn", "auto"))
    flat = keys.flag("neat_packing") and flash == "flash"
    keys.flag("packing"), keys.get("quantization_method")
    return {
        "model": keys.model("model_name_or_path"),
        "rank": keys.number("lora_rank", 8),
        "lora_dropout": keys.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if target == "all" else target,
        "adapter": _adapter(keys, use_dora="use_dora", modules_to_save="additional_target"),
        "quantization": {4: "nf4", 8: "int8"}.get(bits),
        "double_quantization": keys.flag("double_quantization", True) if bits == 4 else None,
        "experts": "unsloth" if keys.flag("use_unsloth") and bits == 4 else None,
        "optimizer": _optimizer(keys, "optim", "adamw_torch"),
        "dtype": "bf16" if keys.flag("bf16") or keys.flag("pure_bf16") else "fp16" if keys.flag("fp16") else "fp32",
        "attention": flash,
        "loss": "cut" if keys.flag("enable_liger_kernel") else None,
        **_rows(keys, "per_device_train_batch_size", 8, keys.number("cutoff_len", 2048), flat=flat),
        **_checkpointing(keys, not keys.flag("disable_gradient_checkpointing"), keys.flag("use_reentrant_gc", True)),
        "offload": keys.flag("use_unsloth_gc"),
        "sharding": _sharding(keys),
    }


_READERS: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "axolotl": _axolotl,
    "TRL": _trl,
    "LLaMA-Factory": _llama_factory,
}
