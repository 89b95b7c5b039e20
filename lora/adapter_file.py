"""Read and check saved LoRA adapters, and export them for other programs, without the base model.

PEFT scales each module by its own alpha / rank (rsLoRA: alpha / sqrt(rank)). Other programs silently differ:

* llama.cpp scales each module by the adapter's single alpha / the module's rank
  (`llama_adapter_lora_weight::get_scale`);
* vLLM allocates the adapter's r for all modules and scales them by its alpha / r; only recent versions read
  `rank_pattern` and `alpha_pattern` (`vllm/lora/peft_helper.py`).

`export_padded` writes a file that works identically in all three. `export_rank_pattern` and `rank_pattern_yaml` return
the configuration of a fresh fine-tune at the same ranks.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..common.errors import ConfigError, NonFiniteError, RunFolderError, UnsupportedError, first_line, shown
from ..common.files import atomic_path, read_object
from .targets import CHANGES_THE_BASE

logger = logging.getLogger(__name__)

T = TypeVar("T")

Tensors = dict[str, torch.Tensor]
"""Tensors of a file, by key."""

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors files."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MOST_CONFIG_BYTES = 2**24
"""Maximum size of an adapter's configuration in bytes; ranks for 50,000 modules take a quarter of it."""

MOST_PATTERN, MOST_REPEATS = 1000, 2
"""Maximum length of a pattern of module names, and maximum number of unbounded repeats in it."""

_TYPES: dict[tuple[type, ...], tuple[str, ...]] = {
    (int,): ("r",),
    (int, float): ("lora_alpha", "lora_dropout"),
    (bool,): ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
    (str,): ("bias", "task_type", "peft_type", "base_model_name_or_path"),
    (str, list): ("target_modules",),
    (list,): ("modules_to_save",),
}
"""Settings that are read or passed on, by type; each may be missing or None."""

_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\}|(?<!\()\?)")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")

PAIR_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(\.weight|\.bias)?")
"""Matches the name of a factor; groups: the module, A or B, and the parameter's name (absent for an embedding)."""


@dataclass(frozen=True)
class SavedAdapter:
    """The contents of an adapter folder.

    Attributes:
        config: the configuration.
        tensors: tensors by key.
        ranks: ranks by module name, or parameter name for fused experts ("model.layers.0.mlp.experts.down_proj").
        alphas: alphas by the same names.
        stacks: parameter name and number of experts, by the file's name of a module that holds experts.
    """

    config: LoraConfig
    tensors: Tensors
    ranks: dict[str, int]
    alphas: dict[str, float]
    stacks: dict[str, tuple[str, int]]

    def scale(self, name: str) -> float:
        """Return the factor by which PEFT multiplies this module's B A; 0 at rank 0."""
        rank = self.ranks[name]
        root = math.sqrt(rank) if self.config.use_rslora else rank
        return self.alphas[name] / root if rank else 0.0

    def settings(self, names: tuple[str, ...]) -> dict[str, object]:
        """Return the enabled settings among those named; settings unknown to PEFT count as disabled."""
        values = {name: getattr(self.config, name, None) for name in names}
        return {name: value for name, value in values.items() if value}

    @property
    def beside_pairs(self) -> dict[str, object]:
        """The settings under which the file holds more than pairs of modules."""
        bias = {} if self.config.bias == "none" else {"bias": self.config.bias}
        return self.settings(("modules_to_save", "trainable_token_indices", "lora_bias")) | bias


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter's configuration and weights, and check their consistency.

    Raises:
        ConfigError: the two disagree about a rank.
        UnsupportedError: the adapter is not LoRA on modules, holds no LoRA pair, or is pickled.
        RunFolderError: a file is missing or corrupt.
    """
    (config, older), tensors = _read_config(folder), _read_tensors(folder)
    ranks, stacks = _ranks(folder, tensors), dict[str, tuple[str, int]]()
    try:
        for module in [name for name in ranks if name.removesuffix(".base_layer").endswith("experts")]:
            if (parameter := _parameter_of(module, config)) is not None:
                rank = int(_resolve(config.rank_pattern, parameter, config.r))
                ranks[parameter], more = divmod(width := ranks.pop(module), width // rank)
                stacks[module] = parameter, width // rank
                if more:
                    raise ValueError(f"{width} rows of {module} are not a multiple of rank {rank}")
        expected = {name: _resolve(config.rank_pattern, name, config.r) for name in ranks}
        alphas = {name: float(_resolve(config.alpha_pattern, name, config.lora_alpha)) for name in ranks}
    except (re.error, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RunFolderError(f"Cannot read the ranks and alphas in {folder / CONFIG_NAME}: {error}") from error
    for name, rank in ranks.items():
        if rank not in (0, expected[name]):
            raise ConfigError(
                f"{name} has rank {rank} in the weights of {folder} but {expected[name]} in its configuration, so "
                "its scale is unknown and plain PEFT cannot load it. Save it again after `sync_config(model, "
                "targets)`."
            )
    return SavedAdapter(config, _turned(folder, tensors, stacks) if older else tensors, ranks, alphas, stacks)


def _turned(folder: Path, tensors: Tensors, stacks: Mapping[str, tuple[str, int]]) -> Tensors:
    """Convert tensors from PEFT before 0.19 to the later layout: A reads the inputs, except in Llama 4.

    The older A belongs to the first axis of the experts' weights. Widths identify it: the input width of `gate_up_proj`
    is the output width of `down_proj`, whose input width is half the output width of `gate_up_proj`.

    Raises:
        UnsupportedError: not both of these have adapters.
    """
    factors: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        match = PAIR_KEY.fullmatch(key)
        if match and match.group(1) in stacks:
            factors.setdefault(stacks[match.group(1)][0], {})[match.group(2)] = key, tensor
    turned = dict(tensors)
    for name, experts in stacks.values():
        stem = name.rpartition(".")[0]
        up, down = (factors.get(f"{stem}.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
        if not up or not down:
            raise UnsupportedError(
                f"{folder} contains expert adapters written by PEFT before 0.19, for only one of gate_up_proj and "
                "down_proj, so their orientation is unknown. Merge them with that version, or retrain."
            )
        inputs = (up["A"][1].shape[1], 2 * down["A"][1].shape[1]) == (down["B"][1].shape[0], up["B"][1].shape[0])
        if inputs == stem.endswith("feed_forward.experts"):  # of Llama 4
            (key_a, a), (key_b, b) = factors[name]["A"], factors[name]["B"]
            turned[key_a] = b.reshape(len(b), -1, experts).permute(2, 1, 0).flatten(0, 1).contiguous()
            turned[key_b] = a.reshape(experts, -1, a.shape[1]).permute(2, 1, 0).flatten(1).contiguous()
    if any(turned[key] is not tensor for key, tensor in tensors.items()):
        logger.warning("%s has expert adapters in the layout of PEFT before 0.19. They are transposed.", folder)
    return turned


_STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters that hold experts, in the order in which PEFT wraps them: the last one is the outermost."""


def _parameter_of(module: str, config: LoraConfig) -> str | None:
    """Return the parameter adapted by a module of the file; None if it holds no experts."""
    stem = module.replace(".base_layer", "")
    wrapped = [name for leaf in _STACKED if _is_parameter(name := f"{stem}.{leaf}", config)]
    depth = module.count(".base_layer")
    return wrapped[::-1][depth] if depth < len(wrapped) else None


def _is_parameter(name: str, config: LoraConfig) -> bool:
    """True if the configuration adapts a parameter of this name."""
    return any(name == each or name.endswith(f".{each}") for each in config.target_parameters or ())


def _resolve(pattern: dict[str, float] | None, name: str, default: float) -> float:
    """Return the value of the first pattern that matches a module, following PEFT's lookup."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def _ranks(folder: Path, tensors: Tensors) -> dict[str, int]:
    """Return the rank by module name, from the shapes of A (rank, ...) and B (..., rank)."""
    sides: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        match = PAIR_KEY.fullmatch(key)
        if match and match.group(3) != ".bias":
            name, side, _ = match.groups()
            sides.setdefault(name, {})[side] = tensor.shape["AB".index(side)] if tensor.dim() > 1 else -1
    if not sides:
        raise UnsupportedError(f"{folder / SAFETENSORS_WEIGHTS_NAME} contains no LoRA pair.")
    for name, sizes in sides.items():
        if sizes.get("A", -1) < 0 or sizes.get("A") != sizes.get("B"):
            raise RunFolderError(f"The pair of {name} in {folder} is incomplete: it needs A and B of the same rank.")
    return {name: sizes["A"] for name, sizes in sides.items()}


def _read_config(folder: Path) -> tuple[LoraConfig, bool]:
    """Return the configuration, and whether adapters of experts have the layout of PEFT before 0.19."""
    path = folder / CONFIG_NAME
    values = _read_file(path, lambda: read_object(path, MOST_CONFIG_BYTES))
    if values.get("peft_type") not in list(PeftType):
        raise RunFolderError(f"{path} is corrupt or not an adapter: peft_type is {shown(values.get('peft_type'))}.")
    _check_types(path, values)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, name, values.get(name) or {})
    config = _read_file(path, lambda: LoraConfig.from_pretrained(str(folder)))
    if type(config) is not LoraConfig:
        raise UnsupportedError(f"{path} is a {type(config).__name__}. Only LoRA adapters can be exported.")
    others = [name for name in config.target_parameters or () if name.rpartition(".")[2] not in _STACKED]
    if others:
        unknown, known = (", ".join(names) for names in (others, _STACKED))
        raise UnsupportedError(f"{path} has unknown target_parameters {unknown}. Known: those ending in {known}.")
    version = str(values.get("peft_version") or "0.17")  # 0.17 did not write its version
    return config, bool(config.target_parameters) and bool(re.match(r"0\.(\d|1[0-8])(\D|$)", version))


def _check_types(path: Path, values: Mapping[str, object]) -> None:
    """Refuse settings with types PEFT does not write, before they reach files for other programs."""
    for name, kinds in ((name, kinds) for kinds, names in _TYPES.items() for name in names):
        value = values.get(name)
        known = value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))
        if not known or (isinstance(value, float) and not math.isfinite(value)):
            raise RunFolderError(f"{path} is corrupt or not an adapter: {name} is {shown(value)}.")


def _check_patterns(path: Path, name: str, patterns: object) -> None:
    """Refuse regular expressions with possibly exponential time; names and simple patterns match at once."""
    if not isinstance(patterns, dict):
        raise RunFolderError(
            f"{path} is corrupt or not an adapter: {name} is {shown(patterns)}, not a mapping of modules to values."
        )
    for pattern in patterns:
        repeats = len(_REPEAT.findall(pattern)) + (pattern.count("(") if "|" in pattern else 0)
        if len(pattern) > MOST_PATTERN or repeats > MOST_REPEATS or _REPEATED_GROUP.search(pattern):
            what = f"{name} {shown(pattern)} in {path}"
            raise RunFolderError(f"The {what} may take very long to match. Write out the module names.")
    for value in patterns.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RunFolderError(f"{path} is corrupt or not an adapter: {name} has the value {shown(value)}.")


def _read_tensors(folder: Path) -> Tensors:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists() and (folder / WEIGHTS_NAME).exists():
        raise UnsupportedError(
            f"{folder / WEIGHTS_NAME} is a pickle, which could run code, so it is not read. If you trust it, "
            "load the adapter with PEFT and save it with `save_pretrained(folder, safe_serialization=True)`."
        )
    return _read_file(path, lambda: load_file(path))


def _read_file(path: Path, read: Callable[[], T]) -> T:
    """Return the result of `read` on a file; raise RunFolderError if the file is missing or corrupt."""
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist. Pass a folder written by `save_pretrained` of a PEFT model.")
    try:
        return read()
    except RecursionError as error:  # PEFT retries endlessly without an unknown setting
        raise RunFolderError(f"{path} is corrupt or not an adapter: it has nested settings.") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SafetensorError) as error:
        raise RunFolderError(f"{path} is corrupt or not an adapter: {first_line(error)}") from error


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values allowed by vLLM for `max_lora_rank` (`MaxLoRARanks` in vllm/config/lora.py)."""

MOST_PADDED_BYTES = 2**33
"""Maximum size of a padded adapter in bytes."""

_OTHER_FORMS = (
    "use_dora", "use_qalora", "use_bdlora", "velora_config", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens", "layer_replication",
)  # fmt: skip
"""LoraConfig settings under which a module does not compute W x + s B A x."""

_AXOLOTL_KEYS = {
    "modules_to_save": "lora_modules_to_save",
    "fan_in_fan_out": "lora_fan_in_fan_out",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "layer_replication": "peft_layer_replication",
    "trainable_token_indices": "peft_trainable_token_indices",
}
"""Axolotl's key for each LoraConfig setting that it passes on (src/axolotl/utils/schemas/peft.py)."""


def export_padded(
    adapter_folder: str | Path, output_folder: str | Path, rank: int | None = None, *, per_expert: bool = False
) -> Path:
    """Write an adapter with equal ranks and scale 1 in every module, for PEFT, vLLM and llama.cpp.

    A is padded with zero rows and B with zero columns. B and its bias (`lora_bias`) are multiplied by the module's
    scale and keep their dtype. All other tensors are copied. A module without a pair stays without one.

    Args:
        adapter_folder: a LoRA adapter written by `save_pretrained`.
        output_folder: a folder that is empty or does not exist.
        rank: the rank of all modules, one of `VLLM_RANKS`; by default the smallest that fits.
        per_expert: write a pair for each matrix of each expert (experts.0.gate_proj), for models with experts as
            modules, instead of one for all; for models with gate and up as the halves of gate_up_proj.

    Returns:
        The output folder.

    Raises:
        ConfigError: vLLM does not allow the rank, a module has a higher one, or weights and configuration disagree.
        UnsupportedError: the adapter is not plain LoRA, is pickled, or changes the base model's weights.
        RunFolderError: the adapter is missing or corrupt, or the output folder is not empty.
        NonFiniteError: a tensor is not finite, before or after it is multiplied by the scale.
    """
    adapter, output = read_adapter(Path(adapter_folder)), Path(output_folder)
    refuse_other_forms(adapter)
    width = _padded_rank(max(adapter.ranks.values()), rank)
    refuse_used(output)
    _check_padded_bytes(adapter, width)
    config = replace(adapter.config, r=width, lora_alpha=width, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    # Trained weights need no initialisation, and 'orthogonal' fails at an odd rank.
    config = replace(config, init_lora_weights=True, eva_config=None)
    with atomic_path(output.resolve()) as temporary:
        temporary.mkdir()
        keys = _write_one_by_one(temporary / SAFETENSORS_WEIGHTS_NAME, lambda: _all_padded(adapter, width, per_expert))
        if per_expert:
            leaves = {key.split(".lora_")[0].rpartition(".")[2] for key in keys if PAIR_KEY.fullmatch(key)}
            config = replace(config, target_parameters=None, target_modules=sorted(leaves))
        config.save_pretrained(str(temporary))
    if settings := adapter.beside_pairs:
        told = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
        logger.warning(
            "%s also contains %s: plain PEFT reads that, but vLLM and llama.cpp may reject it.", output, told
        )
    return output


def export_rank_pattern(adapter_folder: str | Path) -> LoraConfig:
    """Return the configuration for a fresh fine-tune at an adapter's ranks and scalings.

    It lists exactly the modules with a pair, by full name; all other settings are the adapter's.

    Args:
        adapter_folder: a LoRA adapter written by `save_pretrained`.

    Raises:
        ConfigError: weights and configuration disagree, or every module is at rank 0.
        UnsupportedError: the adapter is not LoRA on modules, or is pickled.
        RunFolderError: the adapter is missing or corrupt.
    """
    adapter = read_adapter(Path(adapter_folder))
    if not any(adapter.ranks.values()):
        raise ConfigError(f"All modules of {adapter_folder} are at rank 0, so there is nothing to fine-tune.")
    return pattern_config(adapter.config, adapter.ranks, adapter.alphas)


def pattern_config(config: LoraConfig, all_ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """Return a configuration that adapts exactly the modules with rank above 0, each at its rank and alpha.

    Args:
        config: provides all other settings.
        all_ranks: ranks by full module name; at least one is above 0.
        alphas: alphas of those modules.
    """
    ranks = {name: rank for name, rank in all_ranks.items() if rank}
    widest = max(ranks, key=ranks.__getitem__)
    patterns = {name: f"^{re.escape(name)}" for name in ranks}  # each matches one module only
    one_alpha = len({alphas[name] for name in ranks}) == 1
    return replace(
        config,
        r=ranks[widest],
        lora_alpha=alphas[widest],
        # Full names and no pattern: for mixtures of experts PEFT reduces a pattern to the last parts of the names.
        target_modules=[name for name in ranks if not _is_parameter(name, config)],
        target_parameters=[name for name in ranks if _is_parameter(name, config)] or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={patterns[name]: rank for name, rank in ranks.items()},
        alpha_pattern={} if one_alpha else {patterns[name]: alphas[name] for name in ranks},
        inference_mode=False,
    )


def rank_pattern_yaml(adapter_folder: str | Path) -> str:
    """Return `export_rank_pattern` as lines of an axolotl config file; see `axolotl_yaml`.

    Takes the same folder as `export_rank_pattern`, and raises the same errors.
    """
    return axolotl_yaml(export_rank_pattern(adapter_folder))


def axolotl_yaml(config: LoraConfig) -> str:
    """Return a `pattern_config` as lines of an axolotl config file; comments list what axolotl cannot express.

    Axolotl's keys are `lora_rank_pattern` and `lora_alpha_pattern` (axolotl-ai-cloud/axolotl#3673, July 2026). Their
    values are positive integers, so a fractional alpha is rounded.
    """
    alphas = {key: max(1, round(alpha)) for key, alpha in config.alpha_pattern.items()}
    optional = {key: getattr(config, name, None) for name, key in _AXOLOTL_KEYS.items()}
    lines = [
        *(f"# {comment}" for comment in _axolotl_comments(config, alphas)),
        "adapter: lora",
        f"lora_r: {config.r}",
        f"lora_alpha: {max(1, round(config.lora_alpha))}",
        f"lora_dropout: {config.lora_dropout}",
        *(f"{key}: {json.dumps(value)}" for key, value in optional.items() if value),
        "lora_target_modules:",
        *(f"  - {json.dumps(name)}" for name in sorted(config.target_modules)),
        "lora_rank_pattern:",
        *(f"  {json.dumps(key)}: {rank}" for key, rank in config.rank_pattern.items()),
        *(["lora_alpha_pattern:"] if alphas else []),
        *(f"  {json.dumps(key)}: {alpha}" for key, alpha in alphas.items()),
    ]
    return "\n".join(lines) + "\n"


def _axolotl_comments(config: LoraConfig, alphas: dict[str, int]) -> list[str]:
    needed = "lora_rank_pattern and lora_alpha_pattern need" if alphas else "lora_rank_pattern needs"
    comments = [
        f"Ranks by rankpilot. {needed} axolotl of July 2026 or later",
        ("(axolotl-ai-cloud/axolotl#3673). Do not set lora_target_linear: it would adapt other modules as well."),
    ]
    exact = [(alphas[key], alpha) for key, alpha in config.alpha_pattern.items() if alpha]
    if not alphas and config.lora_alpha:
        exact = [(max(1, round(config.lora_alpha)), config.lora_alpha)]
    error = max((abs(whole / alpha - 1) for whole, alpha in exact), default=0.0)
    if error:
        comments.append(f"Axolotl supports whole alphas only: the relative error of a scaling is up to {error:.2g}.")
    unknown = [n for n in ("lora_bias", *_OTHER_FORMS) if n not in _AXOLOTL_KEYS and getattr(config, n, None)]
    if unknown:
        comments.append(f"Axolotl has no key for {', '.join(unknown)}, with which this adapter was trained.")
    return comments


def _padded_rank(highest: int, wanted: int | None) -> int:
    """Return the rank to pad to: `wanted`, or the smallest vLLM allows from `highest` on."""
    if wanted is not None and wanted not in VLLM_RANKS:
        raise ConfigError(f"vLLM does not support rank {wanted}. Allowed: {', '.join(map(str, VLLM_RANKS))}.")
    fitting = [rank for rank in VLLM_RANKS if rank >= highest and wanted in (None, rank)]
    if not fitting:
        limit = f"rank {wanted}" if wanted else f"{VLLM_RANKS[-1]}, the largest that vLLM supports"
        raise ConfigError(f"A module has rank {highest}, which exceeds {limit}. Padding never lowers a rank.")
    return fitting[0]


def refuse_used(output: Path) -> None:
    """Raise RunFolderError unless a folder is empty or does not exist."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunFolderError(f"{output} already exists. Choose a new or empty folder.")


def _check_padded_bytes(adapter: SavedAdapter, rank: int) -> None:
    """Refuse an adapter too large once padded: a pair of rank 0 can claim any width."""
    taken = 0
    for key, tensor in adapter.tensors.items():
        match = PAIR_KEY.fullmatch(key)
        if match and match.group(3) != ".bias":
            axis = "AB".index(match.group(2))
            taken += rank * (adapter.stacks.get(match.group(1), ("", 1))[1] - 1) * tensor.shape[1 - axis] * 4
            sizes = [size for place, size in enumerate(tensor.shape) if place != axis]
            taken += rank * math.prod(sizes) * tensor.element_size()
    if taken > MOST_PADDED_BYTES:
        reason = f"the adapter would take {taken:,} bytes; the limit for padding is {MOST_PADDED_BYTES:,}"
        raise ConfigError(f"At rank {rank} {reason}.")


def _all_padded(adapter: SavedAdapter, rank: int, per_expert: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a padded adapter, wide dtypes first, which keeps each aligned in the file."""
    for key, tensor in sorted(adapter.tensors.items(), key=lambda item: -item[1].element_size()):
        padded = _padded(adapter, key, tensor, rank)
        yield from _split(key, padded, adapter.stacks) if per_expert else [(key, padded)]


def _write_one_by_one(path: Path, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> list[str]:
    """Write a safetensors file without holding more than one of its tensors, made twice; returns their keys."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors():
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return [*header][1:]


def _padded(adapter: SavedAdapter, key: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Pad one tensor of the file to `rank`; scales B and its bias, and leaves tensors outside pairs unchanged."""
    match = PAIR_KEY.fullmatch(key)
    if match is None:
        return tensor
    module, side, kind = match.groups()
    name, experts = adapter.stacks.get(module, (module, 1))
    new = tensor if side == "A" else (tensor.double() * adapter.scale(name)).to(tensor.dtype)
    if not bool(torch.isfinite(new).all()):
        raise NonFiniteError(
            f"{key} contains NaN or infinity, possibly after multiplying by the scale "
            f"{adapter.scale(name):.4g} in {tensor.dtype}. Save the adapter in float32, and check that its "
            "training did not diverge."
        )
    if kind == ".bias":
        return new
    is_a = side == "A"  # its expert axis is slowest, B's fastest
    each = new.reshape(experts, -1, new.shape[1]) if is_a else new.reshape(new.shape[0], -1, experts)
    padded = nn.functional.pad(each, (0, 0, 0, rank - each.shape[1]))
    return (padded.flatten(0, 1) if is_a else padded.flatten(1)).contiguous()


def _split(key: str, tensor: torch.Tensor, stacks: Mapping[str, tuple[str, int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield one tensor of the file for each expert's matrices: gate and up share A, and each take half of B."""
    match = PAIR_KEY.fullmatch(key)
    if match is None or match.group(1) not in stacks:
        yield key, tensor
        return
    (module, side, _), (parameter, experts) = match.groups(), stacks[match.group(1)]
    stem, _, leaf = parameter.rpartition(".")
    axis = 0 if side == "A" else 1
    sizes = (experts, -1, tensor.shape[1]) if side == "A" else (tensor.shape[0], -1, experts)
    names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    for number, matrix in enumerate(tensor.reshape(sizes).unbind(2 * axis)):
        halves = matrix.chunk(len(names)) if side == "B" else [matrix] * len(names)
        for name, part in zip(names, halves, strict=True):
            yield key.replace(key[key.index(module) :], f"{stem}.{number}.{name}.lora_{side}.weight"), part


def refuse_other_forms(adapter: SavedAdapter) -> None:
    """Raise UnsupportedError unless every module computes W x + s B A x on the unchanged base."""
    forms = adapter.settings(_OTHER_FORMS)
    if forms:
        raise UnsupportedError(
            f"The adapter uses more than LoRA ({', '.join(forms)}), which vLLM and llama.cpp cannot read. "
            "Merge it into its base model with PEFT's `merge_and_unload()` and serve that."
        )
    start = adapter.config.init_lora_weights
    if str(start).lower().startswith(CHANGES_THE_BASE):
        raise UnsupportedError(
            f"init_lora_weights={start!r} changes the base model's weights when PEFT loads the adapter, by an "
            "amount that depends on the rank. Save it with `path_initial_model_for_weight_conversion` to get "
            "plain LoRA."
        )
    unknown = [key for key in adapter.tensors if ".lora_" in key and not PAIR_KEY.fullmatch(key)]
    if unknown:
        raise UnsupportedError(f"{unknown[0]} is not part of a LoRA pair, so the adapter cannot be padded.")
