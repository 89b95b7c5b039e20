"""Saved inputs of adapters: one shared copy, or the inputs of the activation function they come from.

PEFT casts the input of each adapted module to the precision of its adapter, and under autocast each product with a
factor casts again. The query, key and value of a layer read one tensor, and hold three copies of it for the backward
pass. Here the first module creates the copy and the others reuse it. Each keeps its own node in autograd's graph, so
gradients are rounded and accumulated as before: they are bitwise identical.

The adapter below a gate, `act(gate) * up`, saves the product, and autograd saves both factors and the gate. All of it
follows from `gate` and `up`, so the second part of this file only saves these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import ACT2CLS

from ...common.devices import autocast_dtype, without_autocast

CAST = "_cast_input_dtype"
"""The method with which PEFT's layers cast their inputs."""

_COPY = "_rankpilot_copy"
"""Attribute of an input that holds its copy, for the lifetime of the input's Python object."""


def share_input_copies(model: nn.Module) -> Callable[[], None]:
    """Let the plain LoRA layers of a model share copies of their inputs; returns a function to undo it.

    Layers with input dropout are excluded, since their copies differ, and so are variants such as DoRA.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and _is_plain(module) and CAST not in vars(module)
    ]
    for layer in layers:
        setattr(layer, CAST, cast_once)

    def undo() -> None:
        for layer in layers:
            vars(layer).pop(CAST, None)

    return undo


def _is_plain(layer: LoraLayer) -> bool:
    products = all(type(factor) is nn.Linear for factor in layer.lora_A.values())
    drops = any(getattr(each, "p", 0) > 0 for each in layer.lora_dropout.values())
    asked = getattr(layer, "cast_input_dtype_enabled", True)
    return products and bool(layer.lora_A) and not drops and not layer.lora_variant and asked


def cast_once(inputs: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Cast an input to the precision of the product with an adapter's factor.

    Args:
        inputs: of shape (..., d_in).
        dtype: dtype of the factor. Under autocast, autocast's precision takes its place.
    """
    if inputs is None:
        return None
    wanted = autocast_dtype(inputs) or dtype
    if inputs.dtype == wanted:
        return inputs
    if torch.compiler.is_compiling() or inputs.is_inference():  # the compiler merges equal casts itself
        return inputs.to(wanted)
    version, copy = getattr(inputs, _COPY, (None, None))
    if copy is None or copy.dtype != wanted or version != inputs._version:
        copy = inputs.detach().to(wanted)
        setattr(inputs, _COPY, (inputs._version, copy))
    if not (inputs.requires_grad and torch.is_grad_enabled()):
        return copy
    result: torch.Tensor = _Cast.apply(inputs, copy)  # type: ignore[no-untyped-call]
    return result


class _Cast(torch.autograd.Function):
    """A cast with an existing result."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.dtype = inputs.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype), None


# Selective checkpointing ----------------------------------------------------------------------------------------------

ACTIVATIONS = frozenset(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())
"""The activation functions of transformers' models."""

LEAN = frozenset(ACT2CLS[name] for name in ("silu", "swish", "gelu", "gelu_pytorch_tanh"))
"""Single-operator activations, which only save their input."""

PRODUCTS = {torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul}

_RECIPE = "_rankpilot_recipe"
"""Attribute of a tensor that holds its `Recipe`, for the lifetime of the tensor's Python object."""

Make = Callable[..., torch.Tensor]
Steps = list[tuple[Make, int]]
"""Functions that each compute a tensor, and their number of sources."""


def run_activations_again(model: nn.Module) -> Callable[[], None]:
    """Save the input of an activation function in place of its result; returns a function to undo it.

    The input is saved anyway. Consumers of the result are the product of a gate with its other half, and the factors A
    of plain LoRA layers. Each recomputes the function in the backward pass. Nodes in autograd's graph stay the same, so
    gradients are bitwise identical.
    """
    forwards: dict[nn.Module, Make] = {}
    for module in model.modules():
        if type(module) in ACTIVATIONS and not list(module.parameters()):
            forwards[module] = partial(_activated, module.forward, type(module) in LEAN)
        elif isinstance(module, LoraLayer) and _is_plain(module):
            forwards |= {factor: partial(_product, factor) for factor in module.lora_A.values()}
    forwards = {module: forward for module, forward in forwards.items() if "forward" not in vars(module)}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward

    def undo() -> None:
        for module in forwards:
            vars(module).pop("forward", None)

    return undo


@dataclass(frozen=True, eq=False)
class Recipe:
    """Recomputes a tensor from others with cheap operators.

    Attributes:
        make: computes it from the sources.
        sources: tensors saved for the backward pass anyway.
        versions: versions of the tensor and its sources at creation.
    """

    make: Make
    sources: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Recipe:
        """Return a tensor's recipe; the tensor itself if none is known, or anything changed since."""
        found: Recipe | None = vars(tensor).get(_RECIPE)
        if found is None or found.versions != _versions(tensor, *found.sources):
            return cls(_itself, (tensor,), ())
        return found


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _noted(tensor: torch.Tensor, make: Make, *sources: torch.Tensor) -> torch.Tensor:
    """Attach a recipe to a tensor, and return it."""
    vars(tensor)[_RECIPE] = Recipe(make, sources, _versions(tensor, *sources))
    return tensor


def _activated(function: Make, lean: bool, inputs: torch.Tensor) -> torch.Tensor:
    """Return the result of an activation function."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or inputs.is_inference():
        return function(inputs)
    result = function(inputs) if lean else _again(function, partial(_by_autograd, function), inputs)
    if result.dtype != inputs.dtype:  # cast by autocast, which is off in the backward pass
        return result
    return _noted(result.as_subclass(_Activated), function, inputs)


class _Activated(torch.Tensor):
    """The result of an activation function; its products remember their factors."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function not in PRODUCTS or options or not _are_alike(*arguments):
                return function(*arguments, **(options or {}))
            recipes = [Recipe.of(each) for each in arguments]
            result = _again(torch.mul, _factors_gradients, *arguments)
            return _noted(result, partial(_multiplied, _steps(recipes)), *_sources(recipes))


def _are_alike(one: torch.Tensor, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)


def _product(factor: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Return the product of an input with a bias-free factor A, (..., d_in) and (rank, d_in)."""
    same = inputs.dtype == (autocast_dtype(inputs) or factor.weight.dtype)
    if _RECIPE in vars(inputs) and same and torch.is_grad_enabled():
        return _again(_linear, partial(_by_autograd, _linear), inputs, factor.weight)
    return functional.linear(inputs, factor.weight)


def _linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(inputs, weight.to(inputs.dtype))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _steps(recipes: list[Recipe]) -> Steps:
    return [(recipe.make, len(recipe.sources)) for recipe in recipes]


def _sources(recipes: list[Recipe]) -> Iterable[torch.Tensor]:
    return chain.from_iterable(recipe.sources for recipe in recipes)


def _made(steps: Steps, sources: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    rest = iter(sources)
    return [make(*islice(rest, count)) for make, count in steps]


def _multiplied(steps: Steps, *sources: torch.Tensor) -> torch.Tensor:
    return torch.mul(*_made(steps, sources))


Gradients = Callable[[list[torch.Tensor], list[bool], torch.Tensor], Iterable[torch.Tensor | None]]
"""Returns input gradients, given the inputs, a mask of the requested ones, and the result's gradient."""


def _factors_gradients(factors: list[torch.Tensor], asked: list[bool], gradient: torch.Tensor) -> Any:
    return [gradient * other if wanted else None for other, wanted in zip(reversed(factors), asked, strict=True)]


def _by_autograd(function: Make, inputs: list[torch.Tensor], asked: list[bool], gradient: torch.Tensor) -> Any:
    leaves = [each.detach().requires_grad_(wanted) for each, wanted in zip(inputs, asked, strict=True)]
    with torch.enable_grad():
        result = function(*leaves)
    found = iter(torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], gradient))
    return [next(found) if wanted else None for wanted in asked]


def _again(function: Make, gradients: Gradients, *inputs: torch.Tensor) -> torch.Tensor:
    recipes = [Recipe.of(each) for each in inputs]
    result: torch.Tensor = _Again.apply(function, gradients, recipes, *inputs)  # type: ignore[no-untyped-call]
    return result


class _Again(torch.autograd.Function):
    """A function that saves the sources of its inputs, and recomputes the inputs in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, function: Make, gradients: Gradients, recipes: list[Recipe], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients, ctx.steps = gradients, _steps(recipes)
        ctx.save_for_backward(*_sources(recipes))
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with without_autocast():
            inputs = _made(ctx.steps, ctx.saved_tensors)
            return None, None, None, *ctx.gradients(inputs, ctx.needs_input_grad[3:], gradient)
