"""What a run switches on a model beside its weights, noted so that it can be put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..memory.training_step import CHECKPOINT, requires_grad_hook

_SWITCHES = ("gradient_checkpointing", CHECKPOINT, "_loss_function")
"""Attributes of a module that say whether it runs again in the backward pass, and how, and what computes its loss."""


class ModelSettings:
    """Which layers of a transformers model run again, which outputs require gradients, its loss, and its cache.

    Args:
        model: the model, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._switches = [(module, _switches(module)) for module in modules]
        self._hooks = [(module, _gradient_hooks(module)) for module in modules]
        configs: dict[int, Any] = {id(config): config for module in modules if (config := vars(module).get("config"))}
        self._caches = [(one, one.use_cache) for one in configs.values() if hasattr(one, "use_cache")]

    def put_back(self) -> None:
        """Set the model as it was."""
        for module, before in self._switches:
            for name in _switches(module).keys() - before.keys():
                delattr(module, name)
            for name, value in before.items():
                setattr(module, name, value)
        for module, hooks in self._hooks:
            for key in _gradient_hooks(module).keys() - hooks.keys():
                del module._forward_hooks[key]
            module._forward_hooks.update(hooks)
        for config, cache in self._caches:
            config.use_cache = cache


@contextmanager
def settings_put_back(model: nn.Module) -> Iterator[None]:
    """Set a model afterwards as it was before."""
    settings = ModelSettings(model)
    try:
        yield
    finally:
        settings.put_back()


def _switches(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _SWITCHES if name in vars(module)}


def _gradient_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks that make a module's output require gradients."""
    return {key: hook for key, hook in module._forward_hooks.items() if requires_grad_hook(hook)}
