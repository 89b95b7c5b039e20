"""Run adapters of fused experts on the rows routed to each expert.

PEFT adapts a parameter with the matrices of all experts (`target_parameters`) by computing the effective weights of all
of them, W + s B A, in each forward pass; their gradient is as large. Here each expert's rows, already sorted by expert,
go through W and, in parallel, through A and B. It is the same function of the same factors, so the adapter is saved and
loaded as PEFT's. Only rounding differs: x W + s (x A) B in place of x (W + s B A).

A direction with zeros in A and in B stays zero, with zero gradient: an expert can have less than the common rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import _grouped_mm

ALIGNMENT = 16
"""Row size in bytes of factors in grouped products must be a multiple of this."""

ROWS = "_rankpilot_rows"
"""Attribute of a wrapped parameter that holds its `_Pair`."""


def route_rows(model: nn.Module) -> Callable[[], None]:
    """Run adapters of experts on routed rows only; returns a function to undo it.

    Layers without exactly one active, unmerged adapter keep PEFT's way, and so do experts of other forms.
    """
    wrapped = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(module.base_layer) for module in wrapped}
    outer = [m for m in wrapped if id(m) not in inner and _form(m.get_base_layer()) and "forward" not in vars(m)]
    for module in outer:
        for wrapper in _wrappers(module):
            vars(wrapper)[ROWS] = _Pair(wrapper)
        vars(module)["forward"] = partial(_forward, module)

    def undo() -> None:
        for module in outer:
            vars(module).pop("forward", None)
            for wrapper in _wrappers(module):
                vars(wrapper).pop(ROWS, None)

    return undo


def parts_of(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules that compute a layer's adapter: the layer, and its pair on routed rows, if any."""
    pair = vars(layer).get(ROWS)
    return (layer,) if pair is None else (layer, pair)


def _wrappers(outer: ParamWrapper) -> list[ParamWrapper]:
    """Return the wrappers of one layer's experts, the outermost first."""
    found = [outer]
    while isinstance(found[-1].base_layer, ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def _form(experts: nn.Module) -> Callable[..., torch.Tensor] | None:
    """Return the function that runs experts of this form on routed rows; None if unknown."""
    if hasattr(experts, "_apply_gate") and hasattr(experts, "has_bias"):
        plain = experts.has_gate and not getattr(experts, "has_post_expert_norm", False)
        return _sorted_rows if plain and not experts._is_expert_parallel else None
    return _all_rows if type(experts).__name__ == "Llama4TextExperts" else None


def _forward(outer: ParamWrapper, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    wrappers, experts = _wrappers(outer), outer.get_base_layer()
    adapters = {tuple(wrapper.active_adapters) for wrapper in wrappers}
    plain = len(adapters) == 1 and all(len(each) == 1 for each in adapters) and "adapter_names" not in options
    off = any(wrapper.disable_adapters or wrapper.merged for wrapper in wrappers)
    form = _form(experts)
    if not plain or off or form is None or torch.compiler.is_compiling():
        result: torch.Tensor = ParamWrapper.forward(outer, x, *arguments, **options)
        return result
    pairs = {wrapper.parameter_name: vars(wrapper)[ROWS] for wrapper in wrappers}
    return form(experts, pairs, x, *arguments, **options)


class _Pair(nn.Module):
    """The adapter of one parameter as a module, so its computation is attributed to it."""

    def __init__(self, wrapper: ParamWrapper) -> None:
        super().__init__()
        vars(self)["wrapper"] = wrapper  # not registered as a submodule

    def forward(self, result: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """Add s (x A) B to the product of rows with the experts' weights.

        Args:
            result: (rows, d_out), or (experts, rows, d_out) if `offsets` is None.
            rows: (rows, d_in), sorted by expert, or (experts, rows, d_in).
            offsets: end of each expert's rows, int32 (experts,).
        """
        wrapper: ParamWrapper = vars(self)["wrapper"]
        (adapter,) = wrapper.active_adapters
        if adapter not in wrapper.lora_A:
            return result
        a, b = (factors[adapter].weight.to(rows.dtype) for factors in (wrapper.lora_A, wrapper.lora_B))
        count, scaling = wrapper.num_experts, wrapper.scaling[adapter]
        if not a.shape[0]:
            return result
        a, b = a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 1, 0).contiguous()
        if offsets is None:  # Llama 4, whose weights are (experts, d_in, d_out), which PEFT takes for (d_out, d_in)
            first, second = (b, a) if wrapper._did_swap_in_out_features else (a, b)
            product = torch.bmm(torch.bmm(rows, first.mT) * scaling, second)
        else:
            if missing := -a.shape[1] % (ALIGNMENT // a.element_size()):
                a, b = (functional.pad(each, (0, 0, 0, missing)) for each in (a, b))
            product = _grouped_mm(_grouped_mm(rows, a.mT, offs=offsets) * scaling, b, offs=offsets)
        return result.add_(product)  # no product saves its result


def _product(experts: Any, pairs: dict[str, _Pair], name: str, rows: torch.Tensor, offsets: Any) -> torch.Tensor:
    weight = getattr(experts, name)
    weight = weight if experts.is_transposed else weight.mT
    result: torch.Tensor = _grouped_mm(rows, weight, offs=offsets)
    if name in pairs:
        result = pairs[name](result, rows.to(result.dtype), offsets)
    return result


def _sorted_rows(
    experts: Any, pairs: dict[str, _Pair], hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run experts in transformers' layout, following `grouped_mm_experts_forward` in `integrations/moe.py`.

    Args:
        experts: the module.
        pairs: adapters by the parameter's name.
        hidden: (tokens, width).
        index: experts of each token, int64 (tokens, chosen).
        weights: weights of their results, (tokens, chosen).
    """
    chosen = index.shape[-1]
    numbers, order = index.reshape(-1).sort()
    counts = torch.zeros(experts.num_experts, dtype=torch.int32, device=hidden.device)
    counts = counts.index_add(0, numbers, torch.ones_like(numbers, dtype=torch.int32))
    offsets = counts.cumsum(0, dtype=torch.int32)
    made = _product(experts, pairs, "gate_up_proj", hidden.index_select(0, order // chosen), offsets)
    if experts.has_bias:
        made = made + experts.gate_up_proj_bias[numbers]
    inner, share = experts._apply_gate(made), weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    if experts.has_bias:
        made = (_product(experts, pairs, "down_proj", inner, offsets) + experts.down_proj_bias[numbers]) * share
    else:  # the product is linear, and its inputs are narrower than its results
        made = _product(experts, pairs, "down_proj", (inner * share).to(inner.dtype), offsets)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return made.index_select(0, back).view(-1, chosen, made.shape[-1]).sum(dim=1).to(hidden.dtype)


def _all_rows(experts: Any, pairs: dict[str, _Pair], hidden: torch.Tensor) -> torch.Tensor:
    """Run experts of Llama 4: each has rows for all tokens, (experts x tokens, width)."""
    rows = hidden.view(experts.num_experts, -1, experts.hidden_size)
    made = torch.bmm(rows, experts.gate_up_proj)
    made = pairs["gate_up_proj"](made, rows.to(made.dtype), None) if "gate_up_proj" in pairs else made
    gate, up = made.chunk(2, dim=-1)
    inner = up * experts.act_fn(gate)
    made = torch.bmm(inner, experts.down_proj)
    made = pairs["down_proj"](made, inner.to(made.dtype), None) if "down_proj" in pairs else made
    return made.view(-1, experts.hidden_size)
