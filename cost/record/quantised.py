"""Quantised models on the meta device, loaded and prepared for training as by transformers and other programs.

Linear layers are bitsandbytes' own, with empty codes and scales. transformers leaves fused experts as saved; for other
programs see `ExpertBits`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ...lora.peft_config import fused_experts, prepare_quantised
from .. import training_step
from ..step_config import ExpertBits, Quantization
from .live_storages import META_STANDS_FOR

logger = logging.getLogger(__name__)

BLOCK = 64
"""Weights per nf4 scale."""

SCALES_BLOCK = 256
"""Scales per second-level scale, if scales are quantised too."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bitsandbytes' warning at every 8-bit product that it casts the inputs."""
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
    prepare: bool = True,
    experts: ExpertBits = "transformers",
) -> PreTrainedModel:
    """Quantise a meta model as transformers loads it and PEFT prepares it for training.

    Args:
        model: on the meta device; modified. Products with nf4 weights use its precision.
        quantization: nf4 or int8.
        double_quantization: whether nf4's scales are stored in eight bits.
        kept: names of modules to leave unquantised; by default those of transformers, such as the output layer.
        prepare: see `StepConfig.prepare_kbit`.
        experts: storage of fused experts.

    Raises:
        UnsupportedError: bitsandbytes is missing.
    """
    training_step.check_installed(quantization=quantization)
    loaded = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}[quantization]
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**{loaded: True}), pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(model, kept, model._keep_in_fp32_modules)
    skipped += _read_past_layers(model)
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
    if experts != "transformers":
        for part in [part for part in model.modules() if next(fused_experts(part, recurse=False), None) is not None]:
            _quantise_experts(part, quantization, compute_dtype, double_quantization, whole=experts == "axolotl")
    if prepare:
        prepare_quantised(model)
    return model.requires_grad_(False)


def _read_past_layers(model: nn.Module) -> list[str]:
    """Return Mamba mixers that read a layer's weight directly, which has no usable shape once quantised."""
    found = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "A_log") and isinstance(getattr(module, "dt_proj", None), nn.Linear)
    ]
    if found:
        mixer = found[0].rpartition(".")[2]
        logger.warning("Mamba layers cannot be quantised: load the model with llm_int8_skip_modules=[%r].", mixer)
    return found


def _quantise_experts(
    part: nn.Module, quantization: Quantization, dtype: torch.dtype, double: bool, *, whole: bool
) -> None:
    """Quantise the experts of a layer.

    Args:
        part: the module that holds them.
        quantization: nf4 or int8.
        dtype: precision of the products.
        double: whether nf4's scales are stored in eight bits.
        whole: whether all experts of the layer are dequantised at once and saved for the backward pass like any weight;
            otherwise one after the other, and again in the backward pass.
    """
    for name, weight in [(n, p) for n, p in part.named_parameters(recurse=False) if p.dim() == 3]:
        count, rows, columns = weight.shape
        if quantization == "nf4":
            codes: torch.Tensor = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
            scales: list[Any] = [_four_bit_state(weight.shape, double, dtype)]
        else:
            codes, scales = torch.empty(weight.shape, dtype=torch.int8), [torch.empty(count * rows)]
        del part._parameters[name]
        part.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        eight = quantization == "int8" and whole  # created by bitsandbytes in fp32, with two products
        of_one = (count if whole else 1, rows, columns)
        dequantised = _Dequantised(scales, of_one, count, torch.float32 if eight else dtype, products=1 + eight)
        parametrize.register_parametrization(part, name, dequantised, unsafe=True)
    # A parameter read twice in one pass is created once, as with bitsandbytes' hooks.
    part.register_forward_pre_hook(lambda *_: setattr(parametrize, "_cache_enabled", parametrize._cache_enabled + 1))
    part.register_forward_hook(_forget, always_call=True)


@contextmanager
def adapters_on_quantised_experts() -> Iterator[None]:
    """Let PEFT adapt experts that are dequantised on access, as in 0.19, which axolotl uses.

    From 0.21.1 on, it reads a cached weight without its adapter, so one of two adapters never trains.
    """
    usual = ParamWrapper._activate_lora

    @contextmanager
    def activate(self: Any, adapters: list[str]) -> Iterator[None]:
        base, name = self.get_base_layer(), self.parameter_name
        if name not in getattr(base, "parametrizations", ()) or len(adapters) != 1 or adapters[0] not in self.lora_A:
            with usual(self, adapters):
                yield
            return
        change = self.get_delta_weight(adapters[0])
        parametrize.register_parametrization(base, name, _Changed(change))
        try:
            yield
        finally:
            del base.parametrizations[name][-1]

    ParamWrapper._activate_lora = activate
    try:
        yield
    finally:
        ParamWrapper._activate_lora = usual


class _Changed(nn.Module):
    """Adds an adapter's change to the weights of all experts."""

    def __init__(self, change: torch.Tensor) -> None:
        super().__init__()
        self._change = change

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the effective weights, (experts, ...)."""
        return weight + self._change


def _forget(*_: Any) -> None:
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}


class _Dequantised(nn.Module):
    """Dequantises the weights of experts wherever they are read."""

    def __init__(
        self, scales: list[Any], shape: tuple[int, ...], experts: int, dtype: torch.dtype, *, products: int = 1
    ) -> None:
        super().__init__()
        self.quant_state = scales[0]
        self._shape, self._experts, self._dtype, self._products = shape, experts, dtype, products

    @torch.no_grad()
    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights, (experts, ...); experts dequantised one by one share memory."""
        for _ in range(self._products):  # each lives until the next one is created
            made = torch.empty(self._shape, dtype=self._dtype, device=codes.device)
        return made.expand(self._experts, *self._shape[1:])


def _four_bit_state(shape: torch.Size, double: bool, dtype: torch.dtype) -> Any:
    """Return the scales of a weight in bitsandbytes' format."""
    new_state = import_module("bitsandbytes").functional.QuantState
    blocks = -(-shape.numel() // BLOCK)
    scales = torch.empty(blocks, dtype=torch.uint8 if double else torch.float32)
    inner: dict[str, Any] = {}
    if double:
        scales_of_scales = torch.empty(-(-blocks // SCALES_BLOCK))
        state = new_state(absmax=scales_of_scales, code=torch.empty(256), blocksize=SCALES_BLOCK, dtype=torch.float32)
        inner = {"offset": torch.empty(()), "state2": state}
    return new_state(
        absmax=scales,
        shape=shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        **inner,
    )


def _four_bit_layer(d_in: int, d_out: int, compute_dtype: torch.dtype, double: bool, dtype: torch.dtype) -> Any:
    bnb: Any = import_module("bitsandbytes")
    state = _four_bit_state(torch.Size((d_out, d_in)), double, dtype)
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
        """An 8-bit layer trained on the CPU: dequantises its whole weight for each product."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """Return the product of inputs (..., d_in) and the weight."""
            if self.bias is not None and self.bias.dtype != inputs.dtype:
                self.bias.data = self.bias.data.to(inputs.dtype)
            output: torch.Tensor = product(inputs, self.weight, None, self.bias, self.state)
            return output

    kind = OnCpu if META_STANDS_FOR.get() == "cpu" else bnb.nn.Linear8bitLt
    # The few outlier columns, computed in 16 bits, depend on the data and are not counted.
    layer = kind(d_in, d_out, bias=False, has_fp16_weights=False, threshold=0.0)
    codes = torch.empty(d_out, d_in, dtype=torch.int8)
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    layer.state.CB, layer.state.SCB = codes, torch.empty(d_out)
    return layer
