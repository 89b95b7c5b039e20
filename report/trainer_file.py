"""Derive settings of `rankpilot memory` from a training file of axolotl, TRL or LLaMA-Factory.

Keys that affect memory are translated, with the program's own defaults. Keys that do not, such as data and rates, are
ignored; unpriced and unknown ones are reported by name. trainer_keys.json lists the keys of each program.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import MOST_NAME, ConfigError, UnknownNameError, shown
from ..common.files import parse_yaml, read_text
from ..cost.rollouts import Engine, Rollouts

MOST_BYTES = 2**20
"""Maximum size of a file in bytes; reading it takes some seconds."""


@dataclass(frozen=True)
class TrainerFile:
    """The contents of a file.

    Attributes:
        program: its program.
        kind: the kind of training, or several of equal memory: "SFT", "GRPO or RLOO".
        settings: settings of `MemoryConfig`, by name.
        unread: keys unknown to the program, whose effect is not counted.
        unpriced: keys with an uncounted effect on memory, some with a reason.
    """

    program: str
    kind: str
    settings: dict[str, Any]
    unread: tuple[str, ...]
    unpriced: tuple[str, ...] = ()

    @property
    def training(self) -> str:
        """The program and its kind of training."""
        return f"{self.program}'s {self.kind}"

    def remarks(self, path: str) -> Iterator[str]:
        """Yield a line for each kind of uncounted key."""
        if self.unpriced:
            yield f"Settings in {path} that affect memory but are not counted: {', '.join(self.unpriced)}."
        if self.unread:
            table = KEYS[self.program]
            known = {*table["priced"], *table["unpriced"], *table["harmless"]} - set(self.unread)
            near = {key: difflib.get_close_matches(key[:MOST_NAME], known, 1, 0.75) for key in self.unread[:20]}
            near |= {key: [new] for key, new in table["renamed"].items()}
            told = (f"{key} (did you mean {near[key][0]}?)" if near.get(key) else key for key in self.unread)
            program = f"{self.program} {table['version']} ({self.kind})"
            yield f"Settings in {path} unknown to {program}, not counted: {', '.join(told)}."


_RUN = "Remove it, and train with rankpilot run -- COMMAND; rankpilot run --dry -- COMMAND tells the plan."

KEYS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("trainer_keys.json").read_text("utf-8"))
"""Known keys of each program.

version: version of the program covered by the lists.
priced: keys used by the readers below.
unpriced: keys that affect memory, with their neutral value: null for any disabled value.
harmless, older: keys without an effect on memory; the latter belong to earlier versions.
renamed: keys of earlier versions no longer read, by their current name.
kinds: keys that tell kinds of training apart, by the kinds that read them; "loss_type:nll" is one with its value.
"""

TRAINERS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
"""Kinds of training with a command of TRL; others count only where none of these reads all keys of a file."""

_OWN_KEYS = {
    "axolotl": {"base_model"},
    "LLaMA-Factory v1": {"peft_config", "train_dataset", "model_class", "kernel_config", "dist_config"},
    "ms-swift": {"model", "tuner_type", "train_type", "tuner_backend", "attn_impl", "external_plugins", "rlhf_type"},
    "LLaMA-Factory": {
        "finetuning_type",
        "stage",
        "cutoff_len",
        "lora_rank",
        "lora_target",
        "quantization_bit",
        "template",
    },
    "TRL": {"model_name_or_path", "per_device_train_batch_size"},
}
"""Keys of each program that those below it lack."""

_PRICED = {"axolotl": ("SFT", "pretraining"), "LLaMA-Factory": ("SFT", "pretraining"), "TRL": ("SFT", "GRPO", "RLOO")}


def read_trainer_file(path: str | Path, trainer: str | None = None) -> TrainerFile:
    """Read a YAML file of axolotl, TRL or LLaMA-Factory.

    Args:
        path: the file.
        trainer: the kind of training, one of `TRAINERS`; needed for files that several kinds read alike.

    Raises:
        UnknownNameError: there is no such trainer.
        ConfigError: it is missing, not YAML, of another program, or of a training other than LoRA on one language
            model; it fits several kinds of training, and `trainer` names none.
    """
    if trainer not in (None, *TRAINERS):
        raise UnknownNameError.of("trainer", trainer, TRAINERS)
    values = _parsed(Path(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must be a mapping of setting names to values; got {shown(values)}.")
    program = next((name for name, own in _OWN_KEYS.items() if own & set(values)), "")
    if not program:
        rest = "TRL (model_name_or_path) or LLaMA-Factory (model_name_or_path and finetuning_type)"
        first = ", ".join(map(shown, list(values)[:5]))
        raise ConfigError(f"{path} is not a config of axolotl (base_model), {rest}. Its keys: {first}.")
    if program not in KEYS:
        see = f", or see what a run takes by rankpilot run --dry -- swift sft --config {path}" * (program == "ms-swift")
        raise ConfigError(f"{path} is a config of {program}, which is not read. Pass its settings as options{see}.")
    if "rankpilot" in values:
        raise ConfigError(f"{path} has the key rankpilot, which is no longer read. {_RUN}")
    keys, table = _Keys(values, str(path)), KEYS[program]
    kinds = _kinds(program, keys, trainer)
    if program == "TRL":
        settings = _trl(keys, of_sft="SFT" in kinds)
    else:
        settings = _axolotl(keys) if program == "axolotl" else _llama_factory(keys)
    model = keys.get(name := "base_model" if program == "axolotl" else "model_name_or_path")
    if model is not None and not _is_name(model):
        raise ConfigError(f"{path}: {name} must be a model name or a folder; got {shown(model)}.")
    settings |= {"model": model, "sharding": _sharding(keys), "exact_savers": False}
    if settings.get("quantization"):
        settings["prepare_kbit"] = False  # all of them keep norms and embeddings in 16 bits
    keys.notes += [key for key, neutral in table["unpriced"].items() if keys.is_on(key, neutral)]
    known = {key for kind in ("priced", "unpriced", "harmless", "older") for key in table[kind]}
    for of, names in table["kinds"].items():
        foreign = program == "TRL" and not set(kinds) & set(of.split())
        known = known - set(names) if foreign else known | set(names) - set(table["renamed"])
    settings = {name: value for name, value in settings.items() if value is not None}
    unread = tuple(key for key in keys.values if key not in known)
    return TrainerFile(program, " or ".join(kinds), settings, unread, tuple(keys.notes))


def _parsed(path: Path) -> Any:
    """Parse a YAML file; ConfigError if it cannot be read."""
    try:
        return parse_yaml(read_text(path, MOST_BYTES))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path}: {' '.join(str(error).split())}") from error


def _kinds(program: str, keys: _Keys, trainer: str | None) -> list[str]:
    """Return the kinds of training that a file fits, all of equal memory.

    Raises:
        ConfigError: they differ in memory, or none is LoRA of a priced kind; or `trainer` contradicts the file.
    """
    lora: list[Any]
    if program == "TRL":
        name, given, lora = "use_peft", keys.flag("use_peft"), [True]
    elif program == "axolotl":
        name, given, lora = "adapter", keys.get("adapter"), ["lora", "qlora"]
    else:
        name, given, lora = "finetuning_type", keys.get("finetuning_type", "lora"), ["lora"]
    if given not in lora:
        do = f"Set {name}: {' or '.join(map(str, lora)).lower()}"
        raise keys.refuse(f"trains all weights or another adapter than LoRA ({name}: {shown(given)})", do)
    if program == "LLaMA-Factory" and not keys.flag("do_train"):
        others = ("do_predict", "do_eval", "infer_backend", "export_dir")
        found = next((f"{key} without " for key in others if keys.is_on(key)), "")
        raise keys.refuse(f"does not train ({found}do_train: true)", "Set do_train: true for its training")
    table, loss = KEYS[program]["kinds"], keys.get("loss_type")
    has = {key for key in keys.values if program == "TRL" or keys.is_on(key)}
    has |= {f"loss_type:{each}" for each in (loss if isinstance(loss, list) else [loss])}
    told = {key: of.split() for of, names in table.items() for key in names if key in has}
    why = ", ".join([*{str(of): key for key, of in told.items()}.values()][:5])
    every = list(dict.fromkeys(kind for of in table for kind in of.split()))
    if program == "TRL":
        fits = [kind for kind in every if all(kind in of for of in told.values())]
        usual = [kind for kind in fits if kind.lower() in TRAINERS]
        fits = usual if set(usual) & set(_PRICED[program]) else fits
        if trainer:
            fits, why = [kind for kind in every if kind.lower() == trainer], f"--trainer {trainer}"
    else:
        named = keys.word(name := "rl" if program == "axolotl" else "stage", "sft")
        fits = next(iter(told.values()), [{"pt": "pretraining", "rm": "reward"}.get(named, named.upper())])
        why = why or f"{name}: {named}"
        if trainer and trainer != fits[0].lower():
            raise ConfigError(f"{keys.path} configures {fits[0]} ({why}), not {trainer}. Leave --trainer out.")
    priced = [kind for kind in fits if kind in _PRICED[program]]
    if fits and not priced:
        raise keys.refuse(f"configures another kind of training, {' or '.join(fits)}{f' ({why})' if why else ''}")
    if not fits or priced != fits or {"SFT", "GRPO"} <= set(fits):
        words = [kind.lower() for kind in fits or every if kind.lower() in TRAINERS]
        which = "fits several kinds of training" if fits else f"has keys of different kinds of training ({why})"
        raise ConfigError(f"{keys.path} {which}. Pass one of them: --trainer {' or '.join(words)}.")
    return fits


class _Keys:
    """The settings of a file, and notes on unpriced ones."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.empty, self.path, self.notes = set(values) - set(self.values), path, list[str]()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key."""
        return self.values.get(name, default)

    def is_on(self, name: str, neutral: Any = None) -> bool:
        """True if a key has another value than a neutral one; for None, than any that disables."""
        value = self.get(name)
        if value is None or neutral is None:
            return bool(value) and not (isinstance(value, str) and value.lower() in ("false", "no", "none"))
        return bool(value != neutral)

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

    def refuse(self, what: str, do: str = "To measure it, use rankpilot.attach(trainer) in its script") -> ConfigError:
        """Return the error for an unpriced kind of training; `do` is the advice."""
        priced = "rankpilot memory --config prices SFT, and GRPO and RLOO of TRL, with LoRA or QLoRA"
        return ConfigError(f"{self.path} {what}. {priced}. {do}.")


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
    given = keys.get("plugins") or []
    plugins = [*map(str, given)] if isinstance(given, list) else [str(given)]
    if "rankpilot." in str(plugins):
        use = f"Remove it from plugins, and start with rankpilot run --budget 80% -- axolotl train {keys.path}"
        raise ConfigError(f"{keys.path}: rankpilot has no plugin for axolotl any more. {use}.")
    keys.notes += [name for name in plugins if not re.search("CutCrossEntropy|Liger|LMEval|SwanLab", name)]
    switches = [key for key in keys.values if re.fullmatch("lora_(mlp|qkv|o|embedding)_kernel", key)]
    in_8bit = keys.get("adapter") == "lora" and keys.flag("load_in_8bit")
    if not (switches or keys.flag("trust_remote_code") or in_8bit):
        keys.notes.append("lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel (on by default)")
    cut = keys.flag("cut_cross_entropy", "CutCrossEntropy" in str(plugins))
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
    half, precise = keys.flag("fp16"), keys.flag("bfloat16") or keys.flag("bf16", True, "auto", "full")
    quantization, nested, bnb = _quantization(keys), "bnb_4bit_use_double_quant", keys.get("bnb_config_kwargs") or {}
    if not isinstance(bnb, dict):
        raise ConfigError(f"{keys.path}: bnb_config_kwargs must be a mapping; got {shown(bnb)}.")
    keys.notes += [f"bnb_config_kwargs: {shown(key)}" for key in bnb if key not in (nested, "bnb_4bit_quant_type")]
    doubled = keys.switch(nested, bnb.get(nested, True))
    return {
        "rank": keys.number("lora_r", 8),
        "lora_dropout": keys.number("lora_dropout", 0.0, 0),
        "target_modules": "all-linear" if keys.flag("lora_target_linear") else named,
        "target_parameters": _names(keys, "lora_target_parameters"),
        "adapter": _adapter(keys, use_dora="peft_use_dora", modules_to_save="lora_modules_to_save"),
        "quantization": quantization,
        "double_quantization": doubled if quantization == "nf4" else None,
        "experts": "axolotl" if keys.flag("quantize_moe_experts") else None,
        "optimizer": _optimizer(keys, "optimizer", "adamw_torch_fused"),
        "dtype": "bf16" if precise else "fp16" if half else "fp32",
        "attention": attention,
        "loss": "cut" if cut else "liger" if keys.flag("liger_fused_linear_cross_entropy") else None,
        "expandable_segments": True,
        **_rows(keys, "micro_batch_size", 1, length, flat=packs),
        **_checkpointing(keys, checkpointed, True),
        "offload": offload or str(keys.get("gradient_checkpointing")).startswith("offload"),
        "stream": "all" if keys.flag("layer_offloading") else None,
        **_evaluation(keys, held, "eval_batch_size", rows, span, packed=packs, packs="eval_sample_packing"),
    }


_DTYPES = {"auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""TRL's names of precisions; "auto" takes bfloat16, in which most models are saved."""


def _trl(keys: _Keys, *, of_sft: bool) -> dict[str, Any]:
    quantization, nested = _quantization(keys), keys.flag("use_bnb_nested_quant")
    attention, dtype = _attention(keys, "attn_implementation"), keys.word("dtype", "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"{keys.path}: dtype must be one of {', '.join(_DTYPES)}; got {shown(dtype)}.")
    settings = {
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
        "loss": "chunked",
        **_checkpointing(keys, keys.flag("gradient_checkpointing", True), False),
        "offload": keys.flag("activation_offloading"),
    }
    if not of_sft:
        return settings | _grpo(keys)
    flat = (keys.flag("packing") | keys.flag("padding_free")) and attention == "flash"
    loss, length = keys.get("loss_type", "nll"), keys.number("max_length", 1024)
    if loss not in ("nll", "chunked_nll", "dft"):
        raise keys.refuse(f"has loss_type: {shown(loss)}, which is not an SFT loss")
    return {
        **settings,
        "loss": "chunked" if loss != "dft" else None,
        **_rows(keys, "per_device_train_batch_size", 8, length, flat=flat),
        **({"max_length": None} if "max_length" in keys.empty else {}),
        **_evaluation(keys, keys.get("eval_strategy"), _EVAL_ROWS, 8, length, packed=flat, packs="eval_packing"),
    }


def _grpo(keys: _Keys) -> dict[str, Any]:
    """Return what GRPO and RLOO add to a step of SFT on prompts and answers: rows and lengths, and generation."""
    answer, batches = keys.number("max_completion_length", 512), keys.number("gradient_accumulation_steps", 1)
    batches = keys.number("steps_per_generation", batches)
    rows = keys.number("generation_batch_size", keys.number("per_device_train_batch_size", 8) * batches)
    prompt, longest = keys.number("max_prompt_length", 0, 0), keys.number("vllm_max_model_length", 0, 0)
    length = (prompt + answer if prompt else 0) or longest or None
    here = not keys.flag("use_vllm") or keys.word("vllm_mode", "colocate") == "colocate"  # else a server generates
    engine = None
    if keys.flag("use_vllm") and here:
        if keys.flag("load_in_8bit"):
            only = "vLLM does not load a base in 8 bits under TRL. Use 4 bits, or leave use_vllm out"
            raise ConfigError(f"{keys.path}: {only}.")
        share, cards = keys.number("vllm_gpu_memory_utilization", 0.3, 0), keys.number("vllm_tensor_parallel_size", 1)
        engine = Engine(share, keys.flag("vllm_enable_sleep_mode"), cards, longest)
    uncounted = ("cast_lm_head_to_fp32", "sync_ref_model", "use_liger_kernel", "use_transformers_continuous_batching")
    keys.notes += [name for name in uncounted if keys.flag(name)]
    keys.notes += ["eval_strategy"] if keys.word("eval_strategy", "no") != "no" else []
    shape = _rows(keys, "per_device_train_batch_size", 8, 0, flat=False) | {"max_length": length}
    return shape | {"eval_batch_size": "none", "rollouts": Rollouts(rows, engine) if here else None}


def _llama_factory(keys: _Keys) -> dict[str, Any]:
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
    bf16 = keys.flag("bf16") | keys.flag("pure_bf16")
    return {
        "rollouts": rollouts,
        "rank": keys.number("lora_rank", 8),
        "lora_dropout": keys.number("lora_dropout", 0.0, 0),
        "target_modules": "all-linear" if target == "all" else target,
        "adapter": _adapter(keys, use_dora="use_dora", modules_to_save="additional_target"),
        "quantization": {4: "nf4", 8: "int8"}.get(bits),
        "double_quantization": keys.flag("double_quantization", True) if bits == 4 else None,
        "experts": "unsloth" if keys.flag("use_unsloth") and bits == 4 else None,
        "optimizer": _optimizer(keys, "optim", "adamw_torch"),
        "dtype": "bf16" if bf16 else "fp16" if keys.flag("fp16") else None,
        "attention": flash,
        "loss": "liger" if keys.flag("enable_liger_kernel") else None,
        **_rows(keys, "per_device_train_batch_size", 8, length, flat=flat),
        **evaluation,
        **_checkpointing(keys, not keys.flag("disable_gradient_checkpointing"), keys.flag("use_reentrant_gc", True)),
        "offload": keys.flag("use_unsloth_gc"),
    }
