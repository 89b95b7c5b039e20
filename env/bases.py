"""Models of the proxy bases, with LoRA adapters, and what plans on them cost."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from ..cost.calibration import calibrate
from ..cost.cost import ParameterCost, UntimedCost
from ..cost.model import MemoryModel
from ..cost.recording import BatchShape
from ..errors import AssetError
from ..lora.targets import TargetModule, find_target_modules
from .proxy_task import ProxyBase, Unit, find_base

BASES_FOLDER = Path(__file__).parent / "weights"


def new_base_model(base: ProxyBase, *, causal: bool = False) -> PreTrainedModel:
    """An untrained model of the base's architecture, in fp32.

    Args:
        base: the architecture.
        causal: a masked language model as a decoder, with the same weights by name.
    """
    config = AutoConfig.for_model(base.family, **base.config)
    if base.masked:
        config.is_decoder = causal
    kind = AutoModelForMaskedLM if base.masked and not causal else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config)
    return model


def weights_file(name: str) -> Path:
    """The file of a proxy base's weights; AssetError if it is not there."""
    path = BASES_FOLDER / name / "model.safetensors"
    if not path.is_file():
        raise AssetError(
            f"The weights of proxy base {name!r} are missing ({path}). The wheel has those of training and validation "
            f"alone. In a checkout, `git checkout evidence-0.3 -- env/weights/{name}` brings the ones that suites were "
            f"measured on, and `python -m tools.pretrain {name}` makes new ones."
        )
    return path


@lru_cache(maxsize=1)
def _weights(name: str) -> dict[str, Any]:
    return load_file(weights_file(name))


def load_base_model(name: str) -> PreTrainedModel:
    """A fresh copy of a pretrained proxy base, frozen, in evaluation mode, fp32."""
    model, weights = new_base_model(find_base(name)), _weights(name)
    _, unexpected = model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    if unexpected:
        raise AssetError(f"The weights of proxy base {name!r} do not fit its architecture: {unexpected[:3]}.")
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


ALPHA = 16
"""`lora_alpha` of proxy runs: the scaling is 16 / rank, 2 at rank 8, PEFT users' most common setting."""


CALIBRATED_ROWS = 4
"""Rows from which on calibration records the same small steps, whatever their number."""


@lru_cache(maxsize=16)
def adapted_base(name: str) -> tuple[PeftModel, list[TargetModule]]:
    """The proxy base with a LoRA pair on every target module; one a process, since episodes run one after another."""
    base = find_base(name)
    config = LoraConfig(
        r=8,
        lora_alpha=ALPHA,
        target_modules=list(base.target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=base.family == "gpt2",
    )
    model = get_peft_model(load_base_model(name), config)
    return model, find_target_modules(model)


@lru_cache(maxsize=256)
def proxy_cost(base: str, rows: int, length: int, unit: Unit = "bytes", checkpointing: bool = False) -> UntimedCost:
    """What plans on a proxy base cost at one batch shape."""
    if unit == "parameters":
        return ParameterCost.of(adapted_base(base)[1])
    return proxy_memory(base, length, checkpointing).cost(BatchShape(rows, length))


@lru_cache(maxsize=64)
def proxy_memory(base: str, length: int, checkpointing: bool) -> MemoryModel:
    """Predicts the memory of any number of rows."""
    model, targets = adapted_base(base)
    tokens = torch.zeros(CALIBRATED_ROWS, length, dtype=torch.int64)
    inner = model.get_base_model()
    if not checkpointing:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens})
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training alone; the bases have no dropout
    try:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens})
    finally:
        inner.gradient_checkpointing_disable()
        if hasattr(inner, "_require_grads_hook"):  # set by enabling; it would make all later steps save everything
            inner.disable_input_require_grads()
        model.eval()
