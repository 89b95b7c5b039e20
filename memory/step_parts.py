"""The parts of a training step that `StepConfig` names: the optimiser, and gradient checkpointing."""

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


def check_installed(optimizer: OptimizerName = "adamw", quantization: Quantization = "none") -> None:
    """Raise UnsupportedError if the library that an optimiser or a quantisation needs is missing."""
    needing = [f"optimizer {optimizer}"] if optimizer == "adamw8bit" else []
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
    if name == "adamw8bit":
        optimizer: torch.optim.Optimizer = importlib.import_module("bitsandbytes.optim").AdamW8bit(trains, lr=1e-4)
        return optimizer
    return torch.optim.AdamW(trains, lr=1e-4, fused=True)


def checkpoint_segments(base: Any) -> None:
    """Switch gradient checkpointing on in a transformers model; raise UnsupportedError if it has none."""
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise UnsupportedError(f"{type(base).__name__} does not support gradient checkpointing.")
    if hasattr(base, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        base.activation_checkpointing_enable(CHECKPOINTING)
    else:
        base.gradient_checkpointing_enable(CHECKPOINTING)
