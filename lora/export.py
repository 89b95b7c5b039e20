"""Exports saved adapters: padded to one rank for other programs, or as the configuration of their ranks.

PEFT scales each module by that module's alpha / rank (rsLoRA: alpha / sqrt(rank)). Other programs do not, without a
warning:

* llama.cpp scales each module by the adapter's single alpha / the module's rank
  (`llama_adapter_lora_weight::get_scale`);
* vLLM allocates the adapter's r for all modules and scales them by its alpha / r; only recent versions read
  `rank_pattern` and `alpha_pattern` (`vllm/lora/peft_helper.py`).

`export_padded` writes a file that all three read alike. `export_rank_pattern` and `rank_pattern_yaml` give the
configuration of a fresh fine-tune at the same ranks. None of them loads the base model.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..common.files import atomic_path
from ..errors import ConfigError, NonFiniteError, RunFolderError, UnsupportedError, shown
from .adapter_file import PAIR_KEY, SavedAdapter, read_adapter
from .targets import CHANGES_THE_BASE

logger = logging.getLogger(__name__)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for `max_lora_rank` (`MaxLoRARanks` in vllm/config/lora.py)."""

MOST_PADDED_BYTES = 2**33
"""Bytes of a padded adapter, at most."""

_OTHER_FORMS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
)
"""Settings of LoraConfig under which a module computes something else than W x + s B A x."""

_AXOLOTL_KEYS = {
    "modules_to_save": "lora_modules_to_save",
    "fan_in_fan_out": "lora_fan_in_fan_out",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "layer_replication": "peft_layer_replication",
    "trainable_token_indices": "peft_trainable_token_indices",
}
"""Axolotl's key for each setting of LoraConfig that it passes on (src/axolotl/utils/schemas/peft.py)."""


def export_padded(adapter_folder: str | Path, output_folder: str | Path, rank: int | None = None) -> Path:
    """Write an adapter in which every module has the same rank and the scale 1, for PEFT, vLLM and llama.cpp.

    A is padded with zero rows and B with zero columns. B and its bias (`lora_bias`) are multiplied by the module's
    scale and keep their dtype. All other tensors are copied. A module without a pair stays without one.

    Args:
        adapter_folder: a LoRA adapter as `save_pretrained` writes it.
        output_folder: a folder that is empty or does not exist.
        rank: the rank of all modules, one of `VLLM_RANKS`; by default the smallest that fits.

    Returns:
        The output folder.

    Raises:
        ConfigError: vLLM does not allow the rank, a module has a higher one, or weights and configuration disagree.
        UnsupportedError: the adapter is not plain LoRA, is pickled, or changes the base model's weights.
        RunFolderError: the adapter is missing or corrupt, or the output folder is not empty.
        NonFiniteError: a tensor is not finite, before or after it is multiplied by the scale.
    """
    adapter, output = read_adapter(Path(adapter_folder)), Path(output_folder)
    _refuse_other_forms(adapter)
    width = _padded_rank(max(adapter.ranks.values()), rank)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunFolderError(f"{output} exists already. Name a folder that does not, or an empty one.")
    _check_padded_bytes(adapter, width)
    tensors = {key: _padded(adapter, key, tensor, width) for key, tensor in adapter.tensors.items()}
    config = replace(adapter.config, r=width, lora_alpha=width, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    # Trained weights need no initialisation, and 'orthogonal' fails at an odd rank.
    config = replace(config, init_lora_weights=True, eva_config=None)
    try:
        with atomic_path(output.resolve()) as temporary:
            config.save_pretrained(str(temporary))
            save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    except OSError as error:
        raise RunFolderError(f"Cannot write {output}: {error}") from error
    settings = adapter.settings(("modules_to_save", "trainable_token_indices", "lora_bias"))
    if adapter.config.bias != "none":
        settings["bias"] = adapter.config.bias
    if settings:
        told = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
        logger.warning("%s also holds %s: plain PEFT reads that, vLLM and llama.cpp may refuse it.", output, told)
    return output


def export_rank_pattern(adapter_folder: str | Path) -> LoraConfig:
    """The configuration that starts a fresh fine-tune at an adapter's ranks and scalings.

    It lists exactly the modules that have a pair, by full name; all other settings are the adapter's.

    Args:
        adapter_folder: a LoRA adapter as `save_pretrained` writes it.

    Raises:
        ConfigError: weights and configuration disagree, or every module is at rank 0.
        UnsupportedError: the adapter is not LoRA on modules, or is pickled.
        RunFolderError: the adapter is missing or corrupt.
    """
    adapter = read_adapter(Path(adapter_folder))
    if not any(adapter.ranks.values()):
        raise ConfigError(f"All modules of {adapter_folder} are at rank 0: there is nothing to fine-tune again.")
    return pattern_config(adapter.config, adapter.ranks, adapter.alphas)


def pattern_config(config: LoraConfig, all_ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """A configuration that adapts the modules of a rank above 0, each at its rank and alpha, and no others.

    Args:
        config: has all other settings.
        all_ranks: by the full name of a module; one is above 0 at least.
        alphas: of those modules.
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
        target_modules=list(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={patterns[name]: rank for name, rank in ranks.items()},
        alpha_pattern={} if one_alpha else {patterns[name]: alphas[name] for name in ranks},
        inference_mode=False,
    )


def rank_pattern_yaml(adapter_folder: str | Path) -> str:
    """`export_rank_pattern` as lines of an axolotl config file; see `axolotl_yaml`.

    Takes the same folder as `export_rank_pattern`, and raises the same errors.
    """
    return axolotl_yaml(export_rank_pattern(adapter_folder))


def axolotl_yaml(config: LoraConfig) -> str:
    """A `pattern_config` as lines of an axolotl config file; comments list what axolotl cannot express.

    Axolotl's keys are `lora_rank_pattern` and `lora_alpha_pattern` (axolotl-ai-cloud/axolotl#3673, July 2026). Their
    values are whole and positive, so a fractional alpha is rounded.
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
        "(axolotl-ai-cloud/axolotl#3673). Leave lora_target_linear out: it would adapt other modules as well.",
    ]
    exact = [(alphas[key], alpha) for key, alpha in config.alpha_pattern.items() if alpha]
    if not alphas and config.lora_alpha:
        exact = [(max(1, round(config.lora_alpha)), config.lora_alpha)]
    error = max((abs(whole / alpha - 1) for whole, alpha in exact), default=0.0)
    if error:
        comments.append(f"Axolotl takes whole alphas only: the relative error of a scaling is up to {error:.2g}.")
    unknown = [n for n in ("lora_bias", *_OTHER_FORMS) if n not in _AXOLOTL_KEYS and getattr(config, n, None)]
    if unknown:
        comments.append(f"Axolotl has no key for {', '.join(unknown)}, which this adapter was trained with.")
    return comments


def _padded_rank(highest: int, wanted: int | None) -> int:
    """The rank to pad to: `wanted`, or the smallest that vLLM allows and that is not below `highest`."""
    if wanted is not None and wanted not in VLLM_RANKS:
        raise ConfigError(f"vLLM has no slot for rank {wanted}. Allowed: {', '.join(map(str, VLLM_RANKS))}.")
    fitting = [rank for rank in VLLM_RANKS if rank >= highest and wanted in (None, rank)]
    if not fitting:
        limit = f"rank {wanted}" if wanted else f"{VLLM_RANKS[-1]}, the largest that vLLM has a slot for"
        raise ConfigError(f"A module has rank {highest}, which does not fit {limit}. Padding never lowers a rank.")
    return fitting[0]


def _check_padded_bytes(adapter: SavedAdapter, rank: int) -> None:
    """Refuse an adapter that takes too much memory when it is padded: a pair of rank 0 can claim any width."""
    taken = 0
    for key, tensor in adapter.tensors.items():
        match = PAIR_KEY.fullmatch(key)
        if match and match.group(3) != ".bias":
            axis = "AB".index(match.group(2))
            sizes = [size for place, size in enumerate(tensor.shape) if place != axis]
            taken += rank * math.prod(sizes) * tensor.element_size()
    if taken > MOST_PADDED_BYTES:
        raise ConfigError(
            f"At rank {rank} the adapter would take {taken:,} bytes; at most {MOST_PADDED_BYTES:,} are padded."
        )


def _padded(adapter: SavedAdapter, key: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """One tensor of the file, padded to `rank`; B and its bias are scaled, tensors outside of pairs unchanged."""
    match = PAIR_KEY.fullmatch(key)
    if match is None:
        return tensor
    name, side, kind = match.groups()
    new = tensor if side == "A" else (tensor.double() * adapter.scale(name)).to(tensor.dtype)
    if not bool(torch.isfinite(new).all()):
        raise NonFiniteError(
            f"{key} holds NaN or infinity, or does so after multiplication by the scale {adapter.scale(name):.4g} in "
            f"{tensor.dtype}. Save the adapter in float32, and check that its training did not diverge."
        )
    if kind == ".bias":
        return new
    axis = 0 if side == "A" else 1
    shape = list(new.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([new, new.new_zeros(shape)], dim=axis)


def _refuse_other_forms(adapter: SavedAdapter) -> None:
    """Raise UnsupportedError unless every module computes W x + s B A x on the unchanged base."""
    forms = adapter.settings(_OTHER_FORMS)
    if forms:
        raise UnsupportedError(
            f"The adapter is more than LoRA ({', '.join(forms)}), which vLLM and llama.cpp do not read. Merge it into "
            "its base model with PEFT's `merge_and_unload()` and serve that."
        )
    start = adapter.config.init_lora_weights
    if str(start).lower().startswith(CHANGES_THE_BASE):
        raise UnsupportedError(
            f"init_lora_weights={start!r} changes the base model's weights when PEFT loads the adapter, and by "
            "another amount at another rank. Save it with `path_initial_model_for_weight_conversion`: that gives "
            "plain LoRA."
        )
    unknown = [key for key in adapter.tensors if ".lora_" in key and not PAIR_KEY.fullmatch(key)]
    if unknown:
        raise UnsupportedError(f"{unknown[0]} is not a tensor of a LoRA pair, so the adapter cannot be padded.")
