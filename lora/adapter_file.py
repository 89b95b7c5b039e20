"""Reads a saved LoRA adapter and checks it, without its base model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..common.files import read_object
from ..errors import ConfigError, RunFolderError, UnsupportedError, first_line, shown

T = TypeVar("T")

MOST_CONFIG_BYTES = 2**24
"""Bytes of an adapter's configuration, at most; that with a rank for each of 50,000 modules has a quarter of it."""

MOST_PATTERN, MOST_REPEATS = 1000, 2
"""Characters of a pattern of module names, and how often it may repeat something without bound."""

_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "lora_bias": (bool,),
    "fan_in_fan_out": (bool,),
    "bias": (str,),
    "task_type": (str,),
    "peft_type": (str,),
    "base_model_name_or_path": (str,),
    "target_modules": (str, list),
    "modules_to_save": (list,),
}
"""Types of settings that are read or passed on; each may be missing or None."""

_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")

PAIR_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(\.weight|\.bias)?")
"""Matches the name of a factor; groups: the module, A or B, and the parameter's name (absent for an embedding)."""


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter's folder: configuration, tensors by key, rank and alpha by module name."""

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    ranks: dict[str, int]
    alphas: dict[str, float]

    def scale(self, name: str) -> float:
        """The factor by which PEFT multiplies B A of this module; 0 at rank 0."""
        rank = self.ranks[name]
        root = math.sqrt(rank) if self.config.use_rslora else rank
        return self.alphas[name] / root if rank else 0.0

    def settings(self, names: tuple[str, ...]) -> dict[str, object]:
        """The named settings of the configuration that are switched on; a setting that PEFT lacks counts as off."""
        values = {name: getattr(self.config, name, None) for name in names}
        return {name: value for name, value in values.items() if value}


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter's configuration and weights, and check that they agree.

    Raises:
        ConfigError: the two disagree about a rank.
        UnsupportedError: the adapter is not LoRA on modules, holds no LoRA pair, or is pickled.
        RunFolderError: a file is missing or corrupt.
    """
    config, tensors = _read_config(folder), _read_tensors(folder)
    ranks = _ranks(folder, tensors)
    try:
        expected = {name: _resolve(config.rank_pattern, name, config.r) for name in ranks}
        alphas = {name: float(_resolve(config.alpha_pattern, name, config.lora_alpha)) for name in ranks}
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"The ranks and alphas in {folder / CONFIG_NAME} cannot be read: {error}") from error
    for name, rank in ranks.items():
        if rank not in (0, expected[name]):
            raise ConfigError(
                f"{name} has rank {rank} in the weights of {folder} and {expected[name]} in its configuration, so that "
                "its scale is unknown, and plain PEFT cannot load it. Save again after `sync_config(model, targets)`."
            )
    return SavedAdapter(config, tensors, ranks, alphas)


def _resolve(pattern: dict[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that matches a module, as PEFT looks it up."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def _ranks(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Rank by module name, from the shapes of A (rank, ...) and B (..., rank)."""
    sides: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        match = PAIR_KEY.fullmatch(key)
        if match and match.group(3) != ".bias":
            name, side, _ = match.groups()
            size = tensor.shape["AB".index(side)] if tensor.dim() > 1 else -1
            sides.setdefault(name, {})[side] = size
    if not sides:
        raise UnsupportedError(f"{folder / SAFETENSORS_WEIGHTS_NAME} holds no LoRA pair.")
    for name, sizes in sides.items():
        if sizes.get("A", -1) < 0 or sizes.get("A") != sizes.get("B"):
            raise RunFolderError(f"The pair of {name} in {folder} is incomplete: A and B of one rank are needed.")
    return {name: sizes["A"] for name, sizes in sides.items()}


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_NAME
    values = _read_file(path, lambda: read_object(path, MOST_CONFIG_BYTES))
    if values.get("peft_type") not in list(PeftType):
        raise RunFolderError(f"{path} is corrupt or foreign: peft_type is {shown(values.get('peft_type'))}.")
    _check_types(path, values)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, name, values.get(name) or {})
    config = _read_file(path, lambda: LoraConfig.from_pretrained(str(folder)))
    if type(config) is not LoraConfig:
        raise UnsupportedError(f"{path} is of {type(config).__name__}. Only LoRA adapters can be exported.")
    if getattr(config, "target_parameters", None):
        raise UnsupportedError(f"{path} has target_parameters: LoRA on parameters in place of modules is not exported.")
    return config


def _check_types(path: Path, values: Mapping[str, object]) -> None:
    """Refuse settings of other types than PEFT writes, which would find their way into files for other programs."""
    for name, kinds in _TYPES.items():
        value = values.get(name)
        known = value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))
        if not known or (isinstance(value, float) and not math.isfinite(value)):
            raise RunFolderError(f"{path} is corrupt or foreign: {name} is {shown(value)}.")


def _check_patterns(path: Path, name: str, patterns: object) -> None:
    """Refuse regular expressions that may take for ever; module names and simple patterns are matched at once."""
    if not isinstance(patterns, dict):
        raise RunFolderError(f"{path} is corrupt or foreign: {name} is {shown(patterns)}, no values by module.")
    for pattern in patterns:
        repeats = len(_REPEAT.findall(pattern))
        if len(pattern) > MOST_PATTERN or repeats > MOST_REPEATS or _REPEATED_GROUP.search(pattern):
            raise RunFolderError(
                f"{path} has the {name} {shown(pattern)}, which may take very long to match. Write out the names of "
                "the modules."
            )
    for value in patterns.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RunFolderError(f"{path} is corrupt or foreign: {name} has the value {shown(value)}.")


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists() and (folder / WEIGHTS_NAME).exists():
        raise UnsupportedError(
            f"{folder / WEIGHTS_NAME} is a pickle, which can run code when it is read, so it is not. Load the adapter "
            "with PEFT, if you trust it, and save it with `save_pretrained(folder, safe_serialization=True)`."
        )
    return _read_file(path, lambda: load_file(path))


def _read_file(path: Path, read: Callable[[], T]) -> T:
    """Return what `read` reads from a file; raise RunFolderError if the file is missing or corrupt."""
    if not path.is_file():
        raise RunFolderError(f"There is no {path}. Name a folder that `save_pretrained` of a PEFT model wrote.")
    try:
        return read()
    except RecursionError as error:  # PEFT tries again without the setting that it does not know, for ever
        raise RunFolderError(f"{path} is corrupt or foreign: it holds settings inside a setting.") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SafetensorError) as error:
        raise RunFolderError(f"{path} is corrupt or foreign: {first_line(error)}") from error
