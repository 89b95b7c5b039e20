"""The parts of a training step that `StepConfig` names: libraries that it needs, the optimiser, and checkpointing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .step_config import OptimizerName, Quantization

CHECKPOINTING = {"use_reentrant": False}
"""How segments run again: reentrant checkpointing would need inputs with gradients, which a frozen base has not."""


_OF_BITSANDBYTES: dict[str, str] = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def check_installed(optimizer: OptimizerName = "adamw", quantization: Quantization = "none") -> None:
    """Raise UnsupportedError if the library that an optimiser or a quantisation needs is missing."""
    needing = [f"optimizer {optimizer}"] if optimizer in _OF_BITSANDBYTES else []
    needing += [f"quantization {quantization}"] if quantization != "none" else []
    if needing and find_spec("bitsandbytes") is None:
        raise UnsupportedError(f"The {needing[0]} needs bitsandbytes: pip install 'rankpilot[quant]'.")


def new_optimizer(name: OptimizerName, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of that name with the Trainer's settings, over all parameters that train; see `check_installed`."""
    check_installed(name)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trains, lr=1e-4)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        factored: torch.optim.Optimizer = Adafactor(trains, lr=1e-4, scale_parameter=False, relative_step=False)
        return factored
    if name in _OF_BITSANDBYTES:
        kind = getattr(importlib.import_module("bitsandbytes.optim"), _OF_BITSANDBYTES[name])
        optimizer: torch.optim.Optimizer = kind(trains, lr=1e-4)
        return optimizer
    if trains[0].is_meta:  # torch knows no fused kernel for the meta device, which stands for one that has it
        hollow = torch.optim.AdamW(trains, lr=1e-4)
        hollow.defaults["fused"] = True
        return hollow
    return torch.optim.AdamW(trains, lr=1e-4, fused=True)


def has_checkpointing(base: Any) -> bool:
    """Whether the class of a transformers model has gradient checkpointing."""
    return bool(getattr(base, "supports_gradient_checkpointing", False))


def check_checkpointing(base: Any) -> None:
    """Raise UnsupportedError if a transformers model has no gradient checkpointing."""
    if not has_checkpointing(base):
        raise UnsupportedError(f"{type(base).__name__} does not support gradient checkpointing.")


def switch_checkpointing(base: Any, wanted: bool, *, reentrant: bool = False) -> None:
    """Switch gradient checkpointing of a transformers model on or off; raise UnsupportedError if it has none.

    Reentrant checkpointing needs inputs with gradients, which a frozen base does not have: it is asked for them.
    """
    check_checkpointing(base)
    # Its name from transformers 5.20 on, and before.
    name = "activation_checkpointing" if hasattr(base, "activation_checkpointing_enable") else "gradient_checkpointing"
    if wanted:
        getattr(base, f"{name}_enable")(CHECKPOINTING | {"use_reentrant": reentrant})
        release_inputs(base)
    else:
        getattr(base, f"{name}_disable")()


def is_reentrant(function: Any) -> bool:
    """Whether a module's checkpointing function is reentrant: torch's is by default, and transformers binds options."""
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def release_inputs(model: nn.Module) -> None:
    """Let the model's inputs require no gradients any more, unless its checkpointing is reentrant and needs them.

    transformers makes them require gradients under either checkpointing. Then every layer below the lowest adapter
    holds tensors for the backward pass, which runs down to the embeddings for nothing.
    """
    functions = (vars(module).get("_gradient_checkpointing_func") for module in model.modules())
    if any(function is not None and is_reentrant(function) for function in functions):
        return
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if requires_grad_hook(hook):
                del module._forward_hooks[key]


def requires_grad_hook(hook: object) -> bool:
    """Whether a forward hook makes a module's output require gradients, as transformers and PEFT install them."""
    return "require_grad" in getattr(hook, "__name__", "")
