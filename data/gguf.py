"""GGUF files, converted once to what transformers, PEFT and TRL fine-tune: a folder with fp32 safetensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import AssetError


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a new folder.

    Weights that were stored in a few bits are written as the fp32 numbers that they stand for, so that the model is
    an ordinary one, which trains.

    Args:
        file: the GGUF file of a causal language model.
        folder: where the folder is made.

    Raises:
        AssetError: the package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            f"{file.name} is a GGUF file, and reading it needs the package gguf, which is not installed: "
            "pip install 'rankpilot[gguf]'."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model that was read from GGUF passes for a quantised one, which may not be trained.
    config = type(read.config).from_dict(read.config.to_dict())
    vars(config).pop("quantization_config", None)
    config.architectures = [type(read).__name__]
    config.dtype = torch.float32
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
