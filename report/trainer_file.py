"""Derive settings of `rankpilot memory` from a training file of axolotl, TRL or LLaMA-Factory.

Keys that affect memory are translated, with the program's own defaults. Keys that do not, such as data and rates, are
ignored; unpriced and unknown ones are reported by name. trainer_keys.json lists the keys of each program.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import MOST_NAME, ConfigError, shown
from ..common.files import parse_yaml, read_text
from ..cost.rollouts import Engine, Rollouts
from ..finetune.options import KEY, OptionsInFile

MOST_BYTES = 2**20
"""Maximum size of a file in bytes; reading it takes some seconds."""


@dataclass(frozen=True)
class TrainerFile:
    """The contents of a file.

    Attributes:
        program: its program.
        settings: settings of `MemoryConfig`, by name.
        unread: keys unknown to the program, whose effect is not counted.
        unpriced: keys with an uncounted effect on memory, some with a reason.
        run: options of the run under rankpilot; None without them.
    """

    program: str
    settings: dict[str, Any]
    unread: tuple[str, ...]
    unpriced: tuple[str, ...] = ()
    run: OptionsInFile | None = None

    @property
    def sums(self) -> bool:
        """True if the program's loss is known to be a sum over rows or tokens, as that of TRL's SFTTrainer."""
        unsuited = set(self.unpriced) & set(_NO_SUM) or "rollouts" in self.settings
        return self.program == "TRL" and not unsuited

    def remarks(self, path: str) -> Iterator[str]:
        """Yield a line for each kind of uncounted key."""
        if self.unpriced:
            yield f"Settings in {path} that affect memory but are not counted: {', '.join(self.unpriced)}."
        if self.unread:
            table = KEYS[self.program]
            known = [*table["priced"], *table["unpriced"], *table["harmless"]]
            near = {key: difflib.get_close_matches(key[:MOST_NAME], known, 1, 0.75) for key in self.unread[:20]}
            near |= {key: [new] for key, new in table["renamed"].items()}
            told = (f"{key} (did you mean {near[key][0]}?)" if near.get(key) else key for key in self.unread)
            yield f"Settings in {path} unknown to {self.program} {table['version']}, not counted: {', '.join(told)}."


_NO_SUM = ("neftune_noise_alpha", "router_aux_loss_coef", "auto_find_batch_size", "torch_compile")
"""Settings of TRL under which batches run whole."""

KEYS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("trainer_keys.json").read_text("utf-8"))
"""Known keys of each program.

version: version of the program covered by the lists.
priced: keys used by the readers below.
unpriced: keys that affect memory, with their neutral value: null for any disabled value.
harmless, older: keys without an effect on memory; the latter belong to earlier versions.
renamed: keys of earlier versions no longer read, by their current name.
refused: keys of other, unpriced kinds of training, with the kinds that use them.
"""


def read_trainer_file(path: str | Path) -> TrainerFile:
    """Read a YAML file of axolotl, TRL or LLaMA-Factory.

    Raises:
        ConfigError: it is missing, not YAML, of another program, or of a training other than LoRA on one language
            model; or an option of rankpilot in it is invalid.
    """
    values = _parsed(Path(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must be a mapping of setting names to values; got {shown(values)}.")
    program = _program(values)
    if not program:
        rest = "TRL (model_name_or_path) or LLaMA-Factory (model_name_or_path and finetuning_type)"
        first = ", ".join(map(shown, list(values)[:5]))
        raise ConfigError(f"{path} is not a config of axolotl (base_model), {rest}. Its keys: {first}.")
    if program == "ms-swift":
        told = "is a config of ms-swift, which is not read. Pass its settings as options, or see what a run takes by"
        raise ConfigError(f"{path} {told} rankpilot run --dry -- swift sft --config {path}.")
    run = OptionsInFile.of({} if values[KEY] is None else values[KEY], str(path)) if KEY in values else None
    keys = _Keys({key: value for key, value in values.items() if key != KEY}, str(path), guarded=run is not None)
    table = KEYS[program]
    foreign = [key for key in table["refused"] if keys.get(key, False) is not False]
    of_grpo = program == "TRL" and all("GRPO" in table["refused"][key] for key in foreign)
    if foreign and not of_grpo:
        known = Counter(training for key in foreign for training in table["refused"][key])
        most = [training for training, count in known.most_common(3) if count == max(known.values())]
        raise keys.refuse(f"configures another kind of training, {' or '.join(most)} ({', '.join(foreign[:4])})")
    read = _grpo if foreign else _READERS[program]
    settings = read(keys) | {"sharding": _sharding(keys), "exact_savers": False}
    if settings.get("quantization"):
        settings["prepare_kbit"] = False  # all of them keep norms and embeddings in 16 bits
    keys.notes += [key for key, rule in table["unpriced"].items() if keys.changes(key, rule)]
    every = {key for kind in ("priced", "unpriced", "harmless", "older", "refused") for key in table[kind]}
    unread = tuple(key for key in keys.values if key not in every)
    settings = {name: value for name, value in settings.items() if value is not None}
    return TrainerFile(program, settings, unread, tuple(keys.notes), run)


def _parsed(path: Path) -> Any:
    """Parse a YAML file; ConfigError if it cannot be read."""
    try:
        return parse_yaml(read_text(path, MOST_BYTES))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path}: {' '.join(str(error).split())}") from error


def _program(values: Mapping[str, Any]) -> str:
    if "base_model" in values:
        return "axolotl"
    if "model_name_or_path" not in values and _OF_SWIFT & set(values):
        return "ms-swift"
    if "model_name_or_path" in values or "per_device_train_batch_size" in values:
        own = {"finetuning_type", "stage", "cutoff_len", "lora_rank", "lora_target", "quantization_bit", "template"}
        return "LLaMA-Factory" if own & set(values) else "TRL"
    return ""


_OF_SWIFT = {"model", "tuner_type", "train_type", "tuner_backend", "attn_impl", "external_plugins", "use_swift_lora"}
"""Keys of ms-swift that the other programs lack."""

_MEASURE = "To measure it in your own trainer, use rankpilot.attach(trainer)"


class _Keys:
    """The settings of a file, and notes on unpriced ones."""

    def __init__(self, values: dict[str, Any], path: str, *, guarded: bool = False) -> None:
        self.guarded: bool = guarded  # the file has our own key
        self.values = {key: value for key, value in values.items() if value is not None}
        self.empty, self.path, self.notes = set(values) - set(self.values), path, list[str]()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key."""
        return self.values.get(name, default)

    def flag(self, name: str, default: bool = False, *words: str) -> bool:
        """Return a switch, also enabled by any of `words`."""
        return self.switch(name, self.get(name, default), *words)

    def switch(self, name: str, value: Any, *words: str) -> bool:
        """Parse a switch, possibly given as text; ConfigError if invalid."""
        word = value.strip().lower() if isinstance(value, str) else value
        if (isinstance(word, bool | int) and word in (0, 1)) or word in ("true", "yes", "on", *words):
            return bool(word)
        if word in ("false", "no", "off", "none", ""):
            return False
        allowed = ", ".join(("true", "false", *words))
        raise ConfigError(f"{self.path}: {name} must be one of {allowed}; got {shown(value)}.")

    def any(self, *names: str) -> bool:
        """True if any of the switches is on; reads all of them, to validate each."""
        return True in [self.flag(name) for name in names]

    def word(self, name: str, default: str | None = None) -> str:
        """Return a name in lower case; empty for none."""
        value = self.get(name, "")
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}: {name} must be a string; got {shown(value)}.")
        return (value or default or "").lower()

    def number(self, name: str, default: float, least: int = 1) -> Any:
        """Return a number, an integer if the default is one; accepts text (2e-4)."""
        value = self.get(name, default)
        try:
            found = type(default)(value)
            good = found >= least and found == float(value) and not isinstance(value, bool)
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            kind = "whole number" if isinstance(default, int) else "number"
            raise ConfigError(f"{self.path}: {name} must be a {kind} of at least {least}; got {shown(value)}.")
        return found

    def names(self, name: str, default: str | None = None) -> list[str] | str | None:
        """Return module names, or one text: comma-separated names, or a regular expression."""
        value = self.get(name, default)
        if value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_name, value))):
            return value or None
        raise ConfigError(f"{self.path}: {name} must be a name or a list of names; got {shown(value)}.")

    def changes(self, name: str, rule: Any) -> bool:
        """True if an unpriced key has a value that affects memory (see `KEYS`)."""
        value = self.get(name)
        if value is None or rule is None:
            off = isinstance(value, str) and value.lower() in ("false", "no", "none", "")
            return bool(value) and not off
        return bool(value != rule)

    def model(self, name: str) -> str | None:
        """Return the model's name; None if the command line must provide it."""
        value = self.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{self.path}: {name} must be a model name or a folder; got {shown(value)}.")
        return value

    def refuse(self, what: str, do: str = _MEASURE) -> ConfigError:
        """Return the error for an unsupported kind of training; `do` is the advice."""
        return ConfigError(
            f"{self.path} {what}. rankpilot memory --config supports SFT and TRL's GRPO with LoRA or QLoRA. {do}."
        )


_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw", "adam"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "ademamix_8bit", "adamw8bit"), "adamw8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "adamw"),
    **dict.fromkeys(("adamw_torch_4bit", "ao_adamw_4bit"), "adamw4bit"),
    **{"paged_adamw_8bit": "paged_adamw8bit", "adafactor": "adafactor", "sgd": "sgd"},
}


def _optimizer(keys: _Keys, name: str, default: str) -> str:
    given = str(keys.get(name, default)).lower()
    if given not in _OPTIMIZERS:
        near = difflib.get_close_matches(given, _OPTIMIZERS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(_OPTIMIZERS))}."
        raise ConfigError(f"{keys.path}: the memory of optimizer {shown(given)} is unknown.{hint}")
    return _OPTIMIZERS[given]


def _attention(keys: _Keys, key: str, default: str | None = None) -> str | None:
    """Return `MemoryConfig.attention` for an implementation's name; unknown ones are noted."""
    name = keys.word(key, default)
    for part, found in (("flash", "flash"), ("fa2", "flash"), ("fa3", "flash"), ("flex", "flex"), ("sage", "flash")):
        if part in name:
            return found
    known = {"eager": "eager", "disabled": "eager", "sdpa": "sdpa", "xformers": "sdpa", "auto": None, "": None}
    keys.notes += [] if name in known else [f"{key}: {shown(name)}"]
    return known.get(name)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _names(keys: _Keys, name: str, default: str | None = None) -> str | None:
    """Return module names as one text, or a regular expression unchanged."""
    given = keys.names(name, default)
    if isinstance(given, str):  # models are built without a vision tower if possible, and then lack this part
        return re.sub(r"(model\\?\.)language_model(\\?\.)", r"\1(language_model\2)?", given)
    return ",".join(given) if given else None


def _adapter(keys: _Keys, *, use_dora: str, modules_to_save: str) -> dict[str, Any]:
    """Return further arguments of `LoraConfig`, from the program's own keys."""
    found: dict[str, Any] = {"use_dora": True} if keys.flag(use_dora) else {}
    if saved := keys.names(modules_to_save):
        found["modules_to_save"] = saved.split(",") if isinstance(saved, str) else saved
    return found


def _quantization(keys: _Keys) -> str | None:
    """Return the quantisation of the frozen model.

    Raises:
        ConfigError: two conflicting ones are requested.
    """
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if four and eight:
        raise ConfigError(f"{keys.path} sets both load_in_4bit and load_in_8bit. Set only one.")
    return "nf4" if four else "int8" if eight else None


def _bnb(keys: _Keys) -> bool:
    """Return whether axolotl quantises the scales of nf4 weights too; other options of bitsandbytes are noted."""
    given = keys.get("bnb_config_kwargs") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{keys.path}: bnb_config_kwargs must be a mapping; got {shown(given)}.")
    name = "bnb_4bit_use_double_quant"
    keys.notes += [f"bnb_config_kwargs: {shown(key)}" for key in given if key not in (name, "bnb_4bit_quant_type")]
    return keys.switch(name, given.get(name, True))


def _rows(keys: _Keys, batch: str, default: int, length: int, *, flat: bool) -> dict[str, Any]:
    """Return the shape of a batch; packed rows become one row if a kernel separates texts."""
    rows = keys.number(batch, default)
    shape = {"batch_size": 1, "max_length": rows * length} if flat else {"batch_size": rows, "max_length": length}
    return shape | {"packed": flat, "accumulation": keys.number("gradient_accumulation_steps", 1)}


_EVAL_ROWS = "per_device_eval_batch_size"


def _evaluation(
    keys: _Keys, on: object, rows: str, default: int, length: int, *, packed: bool, packs: str = ""
) -> dict[str, Any]:
    """Return the settings of an evaluation.

    Args:
        keys: the file.
        on: what must be set for an evaluation to take place, beside a strategy.
        rows: key of the rows of a batch.
        default: its default.
        length: tokens of a row.
        packed: whether rows of training are packed without padding.
        packs: key that decides whether those of evaluation are; as in training if it is missing.
    """
    strategy = keys.word("eval_strategy") or keys.word("evaluation_strategy")
    if not on or strategy == "no":
        return {"eval_batch_size": "none"}
    packed = packed and keys.flag(packs, True)
    return {"eval_batch_size": keys.number(rows, default), "eval_length": length, "eval_packed": packed}


def _checkpointing(keys: _Keys, on: bool, reentrant: bool) -> dict[str, Any]:
    on = keys.flag("activation_checkpointing", on)  # the name from transformers 5.24 on
    given = keys.get("activation_checkpointing_kwargs") or keys.get("gradient_checkpointing_kwargs") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{keys.path}: gradient_checkpointing_kwargs must be a mapping; got {shown(given)}.")
    keys.notes += ["every_n_layers"] if given.get("every_n_layers", 1) != 1 else []
    reentrant = keys.switch("use_reentrant", given.get("use_reentrant", reentrant))
    by_fsdp = re.search(r"activation_checkpointing\W+true", str(_contents(keys, "fsdp_config")).lower()) is not None
    return {"gradient_checkpointing": on or by_fsdp, "reentrant": on and reentrant}


def _contents(keys: _Keys, name: str) -> Any:
    """Return a key's value, or the contents of the file it names, in the config's folder or the working directory."""
    given = keys.get(name)
    for folder in (Path(keys.path).parent, Path()) if isinstance(given, str) else ():
        with suppress(OSError):  # a text too long for a path
            if (file := folder / given).is_file():
                return _parsed(file)  # JSON is YAML
    return given


def _sharding(keys: _Keys) -> str | None:
    """Return the sharding between several GPUs; their number must be given separately."""
    for name, kinds in (("fsdp", bool | str | list), ("fsdp_config", str | dict), ("deepspeed", str | dict)):
        value = keys.get(name)
        names = value if isinstance(value, list) else ()
        if not (value is False or isinstance(value, kinds | None)) or not all(map(_is_name, names)):
            raise ConfigError(f"{keys.path}: {name} must be a name or a mapping; got {shown(value)}.")
    if keys.get("fsdp") or keys.get("fsdp_config"):
        text = f"{keys.get('fsdp')} {_contents(keys, 'fsdp_config')}".lower()
        keys.notes += ["FSDP offload"] if re.search(r"(offload_params|cpu_offload)\W+true|\boffload\b", text) else []
        keys.notes += ["FSDP that does not shard fully"] if re.search(_PARTLY, text) else []
        return "fsdp2"
    given = _contents(keys, "deepspeed")
    if not given:
        return None
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    text = f"zero{zero.get('stage')} {zero}" if isinstance(zero, dict) else str(given)
    stage = re.search(r"(?<![a-z])z(?:ero)?_?(?:stage)?_?([0-3])(?![0-9]|\.[0-9])", text.lower())
    keys.notes += ["DeepSpeed offload"] if re.search(r"offload(?!\w*\W+device\W+none)", text.lower()) else []
    keys.notes += [] if stage else ["deepspeed (unknown ZeRO stage)"]
    return f"zero{stage[1]}" if stage and stage[1] in "23" else None


_PARTLY = r"reshard_after_forward\W+false|shard_grad_op|no_shard|hybrid_shard|sharding_strategy\W+[2-5]"
"""Settings of FSDP that keep whole weights after the forward pass, or on each machine."""


def _axolotl(keys: _Keys) -> dict[str, Any]:
    adapter, rl = keys.get("adapter"), keys.get("rl")
    if adapter not in ("lora", "qlora"):
        what = "all weights" if adapter is None else f"with adapter: {shown(adapter)}"
        raise keys.refuse(f"trains {what}", "Set adapter: lora or qlora")
    if rl:
        raise keys.refuse(f"trains with rl: {shown(rl)}")
    given = keys.get("plugins") or []
    plugins = [*map(str, given)] if isinstance(given, list) else [str(given)]
    if "rankpilot." in str(plugins):
        use = f"Remove it from plugins, and start with rankpilot run --budget 80% -- axolotl train {keys.path}"
        raise ConfigError(f"{keys.path}: rankpilot has no plugin for axolotl any more. {use}.")
    keys.notes += [name for name in plugins if not re.search("CutCrossEntropy|Liger|LMEval|SwanLab", name)]
    switches = [key for key in keys.values if re.fullmatch("lora_(mlp|qkv|o|embedding)_kernel", key)]
    if not (switches or keys.flag("trust_remote_code") or (adapter == "lora" and keys.flag("load_in_8bit"))):
        keys.notes.append("lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel (on by default)")
    cut = keys.flag("cut_cross_entropy", "CutCrossEntropy" in str(plugins))
    loss = "cut" if cut else "liger" if keys.flag("liger_fused_linear_cross_entropy") else None
    flags = [name for name in ("flash", "sdp", "flex", "eager", "xformers", "sage") if keys.flag(f"{name}_attention")]
    attention = _attention(keys, "attn_implementation", flags[0].replace("sdp", "sdpa") if flags else None)
    packs = keys.flag("sample_packing") and attention in ("flash", "flex", None)
    offload = keys.flag("activation_offloading", False, "legacy", "disk", "hidden_states")
    checkpointed = keys.flag("gradient_checkpointing", False, "offload", "offload_disk", "unsloth")
    named = _names(keys, "lora_target_modules")
    if not named and not keys.flag("lora_target_linear"):
        named, default = "q_proj,v_proj", "PEFT's default is assumed, q_proj and v_proj for most models"
        keys.notes.append(f"lora_target_modules (none given: {default})")
    held, length = keys.number("val_set_size", 0.0, 0) or keys.get("test_datasets"), keys.number("sequence_len", 512)
    rows, span = keys.number("micro_batch_size", 1), keys.number("eval_sequence_len", length)
    quantization, nested = _quantization(keys), _bnb(keys)
    half, precise = keys.flag("fp16"), keys.flag("bfloat16") or keys.flag("bf16", True, "auto", "full")
    return {
        "model": keys.model("base_model"),
        "rank": keys.number("lora_r", 8),
        "lora_dropout": keys.number("lora_dropout", 0.0, 0),
        "target_modules": "all-linear" if keys.flag("lora_target_linear") else named,
        "target_parameters": _names(keys, "lora_target_parameters"),
        "adapter": _adapter(keys, use_dora="peft_use_dora", modules_to_save="lora_modules_to_save"),
        "quantization": quantization,
        "double_quantization": nested if quantization == "nf4" else None,
        "experts": "axolotl" if keys.flag("quantize_moe_experts") else None,
        "optimizer": _optimizer(keys, "optimizer", "adamw_torch_fused"),
        "dtype": "bf16" if precise else "fp16" if half else "fp32",
        "attention": attention,
        "loss": loss,
        "expandable_segments": True,
        **_rows(keys, "micro_batch_size", 1, length, flat=packs),
        **_checkpointing(keys, checkpointed, True),
        "offload": offload or str(keys.get("gradient_checkpointing")).startswith("offload"),
        "stream": "all" if keys.flag("layer_offloading") else None,
        **_evaluation(keys, held, "eval_batch_size", rows, span, packed=packs, packs="eval_sample_packing"),
    }


_DTYPES = {"auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""TRL's names of precisions; "auto" takes bfloat16, in which most models are saved."""


def _trl(keys: _Keys) -> dict[str, Any]:
    if not keys.flag("use_peft"):
        raise keys.refuse("trains all weights, since TRL's use_peft defaults to false", "Set use_peft: true")
    loss = keys.get("loss_type", "nll")
    if loss not in ("nll", "chunked_nll", "dft"):
        raise keys.refuse(f"has loss_type: {shown(loss)}, which is not an SFT loss")
    quantization, nested = _quantization(keys), keys.flag("use_bnb_nested_quant")
    attention = _attention(keys, "attn_implementation")
    flat = keys.any("packing", "padding_free") and attention == "flash"
    length, dtype = keys.number("max_length", 1024), keys.word("dtype", "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"{keys.path}: dtype must be one of {', '.join(_DTYPES)}; got {shown(dtype)}.")
    return {
        "model": keys.model("model_name_or_path"),
        "rank": keys.number("lora_r", 16),
        "lora_dropout": keys.number("lora_dropout", 0.05 if "lora_target_parameters" not in keys.values else 0.0, 0),
        "target_modules": _names(keys, "lora_target_modules", "q_proj,v_proj"),
        "target_parameters": _names(keys, "lora_target_parameters"),
        "adapter": _adapter(keys, use_dora="use_dora", modules_to_save="lora_modules_to_save"),
        "quantization": quantization,
        "double_quantization": nested if quantization == "nf4" else None,
        "optimizer": _optimizer(keys, "optim", "adamw_torch_fused"),
        "dtype": _DTYPES[dtype],
        "bf16": keys.flag("bf16", not keys.flag("fp16")),
        "attention": attention,
        "loss": "chunked" if loss != "dft" else None,
        **_rows(keys, "per_device_train_batch_size", 8, length, flat=flat),
        **({"max_length": None} if "max_length" in keys.empty else {}),
        **_evaluation(keys, keys.get("eval_strategy"), _EVAL_ROWS, 8, length, packed=flat, packs="eval_packing"),
        **_checkpointing(keys, keys.flag("gradient_checkpointing", True), False),
        "offload": keys.flag("activation_offloading"),
    }


_GRPO_NOTES = ("cast_lm_head_to_fp32", "sync_ref_model", "use_liger_kernel", "use_transformers_continuous_batching")
"""Settings of GRPO that affect memory and are not counted."""


def _grpo(keys: _Keys) -> dict[str, Any]:
    """Return the settings of TRL's GRPOTrainer, whose step is SFT's on prompts and answers, with generation between."""
    if keys.guarded:
        raise keys.refuse("sets options of rankpilot under GRPO", f"Remove {KEY}")
    answer, batches = keys.number("max_completion_length", 512), keys.number("gradient_accumulation_steps", 1)
    batches = keys.number("steps_per_generation", batches)
    rows = keys.number("generation_batch_size", keys.number("per_device_train_batch_size", 8) * batches)
    prompt, longest = keys.number("max_prompt_length", 0, 0), keys.number("vllm_max_model_length", 0, 0)
    length = (prompt + answer if prompt else 0) or longest or None
    engine = None
    if keys.flag("use_vllm") and keys.word("vllm_mode", "colocate") == "colocate":
        share, cards = keys.number("vllm_gpu_memory_utilization", 0.3, 0), keys.number("vllm_tensor_parallel_size", 1)
        engine = Engine(share, keys.flag("vllm_enable_sleep_mode"), cards, longest)
    keys.notes += [name for name in _GRPO_NOTES if keys.flag(name)]
    keys.notes += ["eval_strategy"] if keys.word("eval_strategy", "no") != "no" else []
    own = {"loss_type": "nll", "max_length": length or 2, "eval_strategy": None}
    if engine and keys.flag("load_in_8bit"):
        raise ConfigError(
            f"{keys.path}: vLLM does not load a base in 8 bits under TRL. Use 4 bits, or leave use_vllm out."
        )
    of_sft = _Keys({**keys.values, **own}, keys.path)
    settings = _trl(of_sft) | {"max_length": length, "eval_batch_size": "none"}
    keys.notes += of_sft.notes
    generates = not keys.flag("use_vllm") or engine is not None  # else a server elsewhere does
    return settings | {"rollouts": Rollouts(rows, engine) if generates else None}


def _llama_factory(keys: _Keys) -> dict[str, Any]:
    kind, stage = keys.get("finetuning_type", "lora"), keys.get("stage", "sft")
    if kind != "lora":
        raise keys.refuse(f"trains with finetuning_type: {shown(kind)}", "Set finetuning_type: lora")
    if stage not in ("sft", "pt"):
        raise keys.refuse(f"trains in stage: {shown(stage)}")
    bits, target = keys.number("quantization_bit", 0, 0), _names(keys, "lora_target", "all")
    if bits not in (0, 4, 8):
        raise ConfigError(f"{keys.path}: quantization_bit: {bits} is not supported. Use 4 or 8.")
    flash = _attention(keys, "flash_attn")
    flat = keys.flag("neat_packing") and flash == "flash"
    held, length = keys.number("val_size", 0.0, 0) or keys.get("eval_dataset"), keys.number("cutoff_len", 2048)
    evaluation = _evaluation(keys, held and keys.get("eval_strategy"), _EVAL_ROWS, 8, length, packed=flat)
    answer, rollouts = keys.number("max_new_tokens", 1024), None
    if keys.flag("predict_with_generate") and evaluation["eval_batch_size"] != "none":
        rollouts = Rollouts(evaluation["eval_batch_size"], length=length + answer)
        evaluation = {"eval_batch_size": "none"}  # it computes no loss then
    return {
        "model": keys.model("model_name_or_path"),
        "rollouts": rollouts,
        "rank": keys.number("lora_rank", 8),
        "lora_dropout": keys.number("lora_dropout", 0.0, 0),
        "target_modules": "all-linear" if target == "all" else target,
        "adapter": _adapter(keys, use_dora="use_dora", modules_to_save="additional_target"),
        "quantization": {4: "nf4", 8: "int8"}.get(bits),
        "double_quantization": keys.flag("double_quantization", True) if bits == 4 else None,
        "experts": "unsloth" if keys.flag("use_unsloth") and bits == 4 else None,
        "optimizer": _optimizer(keys, "optim", "adamw_torch"),
        "dtype": "bf16" if keys.any("bf16", "pure_bf16") else "fp16" if keys.flag("fp16") else None,
        "attention": flash,
        "loss": "liger" if keys.flag("enable_liger_kernel") else None,
        **_rows(keys, "per_device_train_batch_size", 8, length, flat=flat),
        **evaluation,
        **_checkpointing(keys, not keys.flag("disable_gradient_checkpointing"), keys.flag("use_reentrant_gc", True)),
        "offload": keys.flag("use_unsloth_gc"),
    }


_Reader = Callable[[_Keys], dict[str, Any]]
_READERS: dict[str, _Reader] = {"axolotl": _axolotl, "TRL": _trl, "LLaMA-Factory": _llama_factory}
