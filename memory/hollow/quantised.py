"""Hollow models in four or eight bits: bitsandbytes' own layers, on codes and scales without contents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..device_kind import META_STANDS_FOR
from ..step_config import Quantization
from ..step_parts import check_installed

BLOCK = 64
"""Weights that share one scale in nf4."""

SCALES_BLOCK = 256
"""Scales that share one scale of theirs, where scales are quantised too."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep bitsandbytes from saying at every 8-bit product that it casts the inputs."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def quantise(
    model: PreTrainedModel,
    quantization: Quantization,
    *,
    double_quantization: bool = True,
    kept: list[str] | None = None,
) -> PreTrainedModel:
    """A hollow model as transformers loads it in fewer bits and PEFT prepares it for training.

    Args:
        model: on the meta device; it is changed. Products with nf4 weights are in its precision.
        quantization: nf4 or int8.
        double_quantization: whether nf4's scales are stored in eight bits.
        kept: names of modules that are not quantised; by default those that transformers chooses, such as the output
            layer.

    Raises:
        UnsupportedError: bitsandbytes is missing.
    """
    check_installed(quantization=quantization)
    loaded = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}[quantization]
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**{loaded: True}), pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(model, kept, model._keep_in_fp32_modules)
    compute_dtype = model.dtype
    for name, module in list(model.named_modules()):
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped):
            d_in, d_out = module.weight.shape[:: 1 if isinstance(module, Conv1D) else -1]
            if quantization == "nf4":
                layer = _four_bit_layer(d_in, d_out, compute_dtype, double_quantization, module.weight.dtype)
            else:
                layer = _eight_bit_layer(d_in, d_out)
            layer.bias = module.bias
            layer.source_cls = type(module)
            layer.requires_grad_(False)
            model.set_submodule(name, layer)
    setattr(model, f"is_{loaded.replace('load', 'loaded')}", True)
    model.is_quantized = True
    prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return prepared


def _four_bit_layer(d_in: int, d_out: int, compute_dtype: torch.dtype, double: bool, dtype: torch.dtype) -> Any:
    bnb: Any = import_module("bitsandbytes")
    new_state = bnb.functional.QuantState
    blocks = -(-d_in * d_out // BLOCK)
    scales = torch.empty(blocks, dtype=torch.uint8 if double else torch.float32)
    inner: dict[str, Any] = {}
    if double:
        scales_of_scales = torch.empty(-(-blocks // SCALES_BLOCK))
        state = new_state(absmax=scales_of_scales, code=torch.empty(256), blocksize=SCALES_BLOCK, dtype=torch.float32)
        inner = {"offset": torch.empty(()), "state2": state}
    state = new_state(
        absmax=scales,
        shape=torch.Size((d_out, d_in)),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        **inner,
    )
    layer = bnb.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    codes = torch.empty((d_in * d_out + 1) // 2, 1, dtype=torch.uint8)
    options = {"quant_state": state, "compress_statistics": double, "quant_type": "nf4", "bnb_quantized": True}
    layer.weight = bnb.nn.Params4bit(codes, blocksize=BLOCK, module=layer, **options)
    layer.quant_state = state
    return layer


def _eight_bit_layer(d_in: int, d_out: int) -> Any:
    bnb: Any = import_module("bitsandbytes")
    product: Any = import_module("bitsandbytes.autograd._functions").MatMul8bitFp.apply

    class OnCpu(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """The layer as it trains on the CPU: it makes its weight whole for each product."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """The product of inputs of shape (..., d_in) and the weight."""
            if self.bias is not None and self.bias.dtype != inputs.dtype:
                self.bias.data = self.bias.data.to(inputs.dtype)
            output: torch.Tensor = product(inputs, self.weight, None, self.bias, self.state)
            return output

    kind = OnCpu if META_STANDS_FOR.get() == "cpu" else bnb.nn.Linear8bitLt
    # Which columns are outliers, and computed in 16 bits, depends on the data: they are few, and not counted.
    layer = kind(d_in, d_out, bias=False, has_fp16_weights=False, threshold=0.0)
    codes = torch.empty(d_out, d_in, dtype=torch.int8)
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    layer.state.CB, layer.state.SCB = codes, torch.empty(d_out)
    return layer
