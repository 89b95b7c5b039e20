"""Merge a saved adapter into its base model's files, without loading the model.

The files are copied, and the adapted weights in the copies replaced one at a time: main memory holds one weight and its
product, however large the model. Results equal those of PEFT's `merge_and_unload` on a CPU, in the dtype of the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import NonFiniteError, RunFolderError, UnsupportedError, first_line, shown
from ..common.files import atomic_path, check_tensor_file
from .adapter_file import DTYPES, PAIR_KEY, SavedAdapter, read_adapter, refuse_other_forms, refuse_used

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that hold the base's weights once more, and are not copied."""

_PEFT = "Merge it with PEFT's `merge_and_unload()`."


def export_merged(adapter_folder: str | Path, output_folder: str | Path, base_folder: str | Path | None = None) -> Path:
    """Write a model with an adapter merged into its weights, for any program; takes the memory of one weight.

    Args:
        adapter_folder: a LoRA adapter written by `save_pretrained`.
        output_folder: a folder that is empty or does not exist.
        base_folder: folder of the base model, with its weights in safetensors files; by default the one that the
            adapter names, if it is a folder or has been downloaded.

    Returns:
        The output folder.

    Raises:
        UnsupportedError: the adapter is not plain LoRA on modules, or the base's files do not hold a module's weight
            under its name, unquantised.
        RunFolderError: the adapter or the base is missing or corrupt, or the output folder is not empty.
        NonFiniteError: a merged weight is not finite.
        ConfigError: weights and configuration of the adapter disagree.
    """
    adapter, output = read_adapter(Path(adapter_folder)), Path(output_folder)
    refuse_other_forms(adapter)
    pairs, base = _pairs(adapter), _folder_of(base_folder or adapter.config.base_model_name_or_path)
    refuse_used(output)
    with atomic_path(output.resolve()) as temporary:
        temporary.mkdir()
        for path in (each for each in base.iterdir() if each.is_file() and each.suffix not in _PICKLES):
            shutil.copyfile(path, temporary / path.name)
        for path in sorted(temporary.glob("*.safetensors")):
            for name in _merge(adapter, pairs, path):
                del pairs[name]
        if pairs:
            told = f"{base} holds no weight named {next(iter(pairs))}.weight"
            raise UnsupportedError(f"{told}, as for {len(pairs)} of the adapter's modules. {_PEFT}")
    return output


def _folder_of(base: str | Path | None) -> Path:
    """Return the folder of a base model: a path, or the downloaded files of a Hugging Face id."""
    path = Path(base or "")
    if base and not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        with suppress(HFValidationError, LocalEntryNotFoundError):
            path = Path(snapshot_download(str(base), local_files_only=True))
    if not base or not any(path.glob("*.safetensors")):
        raise RunFolderError(f"{shown(str(base))} is no folder with the base model's safetensors files. Pass --base.")
    return path


def _pairs(adapter: SavedAdapter) -> dict[str, dict[str, torch.Tensor]]:
    """Return A and B by module, for modules with a rank.

    Raises:
        UnsupportedError: the file holds more than pairs of modules.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        if (match := PAIR_KEY.fullmatch(key)) and match.group(3) == ".weight":
            found.setdefault(match.group(1), {})[match.group(2)] = tensor
    others = [f"{name}={shown(value)}" for name, value in adapter.beside_pairs.items()]
    others += [name for name in adapter.ranks if name not in found]
    if others:
        raise UnsupportedError(f"The adapter has more than pairs of modules: {others[0]}. {_PEFT}")
    return {name: pair for name, pair in found.items() if adapter.ranks[name]}


def _merge(adapter: SavedAdapter, pairs: dict[str, dict[str, torch.Tensor]], path: Path) -> Iterator[str]:
    """Merge pairs into a file of weights, in place; yields the name of each merged module."""
    try:
        check_tensor_file(path, 2**63)
        with safe_open(path, "pt"):  # checks the header
            pass
    except (ValueError, SafetensorError) as error:
        raise RunFolderError(f"{path.name} of the base model is corrupt: {first_line(error)}") from error
    with path.open("r+b") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for key, entry in header.items():
            name = key.removesuffix(".weight")
            if key != name and name in pairs:
                file.seek(start + entry["data_offsets"][0])
                _replace(file, entry, key, _delta(adapter, name, **pairs[name]))
                yield name


def _delta(adapter: SavedAdapter, name: str, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the change of a weight, as PEFT computes it on a CPU."""
    dtype = B.dtype
    product = (B.float() @ A.float() if dtype.itemsize < 4 else B @ A).mul_(adapter.scale(name))
    return (product.T if adapter.config.fan_in_fan_out else product).to(dtype)


def _replace(file: BinaryIO, entry: dict[str, Any], key: str, delta: torch.Tensor) -> None:
    """Add a change to the weight at the position of a file."""
    start, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    if not dtype.is_floating_point or dtype.itemsize < 2 or entry["shape"] != [*delta.shape]:
        told = f"{entry['dtype']} of shape {entry['shape']}, where the adapter changes {[*delta.shape]}"
        raise UnsupportedError(f"{key} is {told}: it is quantised, or not this adapter's. Pass the unquantised base.")
    content = torch.from_numpy(np.fromfile(file, np.uint8, end - start))
    weight = content.view(dtype).reshape(entry["shape"]).add_(delta)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{key} contains NaN or infinity after merging. Check that training did not diverge.")
    file.seek(start - end, 1)
    file.write(weight.flatten().view(torch.uint8).numpy().data)
