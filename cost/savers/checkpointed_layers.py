"""Checkpointed layers: a saver for single layers of a transformers model, with the settings that it changes.

A checkpointed layer keeps its inputs and runs again in the backward pass. Losses are unchanged, but steps take longer,
so a plan checkpoints as few layers as it can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...common.errors import UnsupportedError
from ...lora.targets import unwrap
from .. import training_step

_SWITCHES = ("gradient_checkpointing", training_step.CHECKPOINT)
"""Attributes of a module that control whether and how it is checkpointed."""


class ModelSettings:
    """Settings of a transformers model: checkpointed layers, outputs that require gradients, and the cache.

    Args:
        model: the model to record.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._switches = [(module, _switches(module)) for module in modules]
        self._hooks = [(module, _gradient_hooks(module)) for module in modules]
        configs: dict[int, Any] = {id(config): config for module in modules if (config := vars(module).get("config"))}
        self._caches = [(one, one.use_cache) for one in configs.values() if hasattr(one, "use_cache")]

    def put_back(self) -> None:
        """Restore the model."""
        for module, before in self._switches:
            for name in _switches(module).keys() - before.keys():
                delattr(module, name)
            for name, value in before.items():
                setattr(module, name, value)
        for module, hooks in self._hooks:
            for key in _gradient_hooks(module).keys() - hooks.keys():
                del module._forward_hooks[key]
            module._forward_hooks.update(hooks)
        self.put_back_caches()

    def put_back_caches(self) -> None:
        """Restore the model's settings of its key-value caches."""
        for config, cache in self._caches:
            config.use_cache = cache


@contextmanager
def settings_put_back(model: nn.Module) -> Iterator[None]:
    """Restore a model's settings afterwards."""
    settings = ModelSettings(model)
    try:
        yield
    finally:
        settings.put_back()


def _switches(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _SWITCHES if name in vars(module)}


def _gradient_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the hooks that make a module's output require gradients."""
    return {key: hook for key, hook in module._forward_hooks.items() if training_step.requires_grad_hook(hook)}


class LayerCheckpointing:
    """Checkpoints single layers of a transformers model. Losses are unchanged.

    Args:
        model: the PEFT model. All its layers are checkpointed until `put_back`, so that the step can be measured.
        whole: checkpoint all layers with saved activations, whatever the limit: for the fewest bytes.

    Attributes:
        layers: the names of the checkpointed layers.

    Raises:
        UnsupportedError: the model has no layers that can be checkpointed individually.
    """

    def __init__(self, model: nn.Module, *, whole: bool = False) -> None:
        base, self.whole = unwrap(model), whole
        training_step.check_checkpointing(base)
        inner = training_step.inner_layers(model)
        found = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
        self._layers = {name: layer for name, layer in found.items() if layer not in inner}
        if not self._layers:
            raise UnsupportedError(
                f"{type(base).__name__} checkpoints either all its layers or none, so a plan cannot choose among them: "
                "set gradient_checkpointing to True or False."
            )
        self._before: ModelSettings | None = ModelSettings(model)
        training_step.switch_checkpointing(base, True)
        base.config.use_cache = False  # a checkpointed layer would fill the cache twice
        self.layers: tuple[str, ...] = tuple(self._layers)

    def put_back(self) -> None:
        """Restore the original checkpointing and the model's cache; only the first call has an effect."""
        if self._before:
            self._before.put_back()
            for layer in self._layers.values():  # like their submodules: see `before_step`
                layer.training = next(layer.children(), layer).training
        self._before = None

    def before_step(self) -> None:
        """Put the chosen layers, but not their submodules, into training mode, as transformers' checkpointing requires.

        Layers that apply dropout themselves are left alone, as without rankpilot.
        """
        for layer in map(self._layers.__getitem__, self.layers):
            layer.training = layer.training or not drops_itself(layer)

    def pause(self) -> None:
        """Checkpoint no layer, and restore the original cache; call inside `settings_put_back`."""
        for layer in self._layers.values():
            layer.gradient_checkpointing = False
        if self._before:
            self._before.put_back_caches()

    def all(self) -> None:
        """Checkpoint all layers."""
        self.take(self._layers)

    def take(self, layers: Collection[str]) -> None:
        """Checkpoint exactly these layers."""
        self.layers = self.ordered(layers)
        for name, layer in self._layers.items():
            layer.gradient_checkpointing = name in layers

    def ordered(self, layers: Collection[str]) -> tuple[str, ...]:
        """Return some layers in the order of the model."""
        return tuple(name for name in self._layers if name in layers)

    def __str__(self) -> str:
        return f"{len(self.layers)} of {len(self._layers)} layers use gradient checkpointing"


def could_checkpoint(model: nn.Module) -> bool:
    """True if a model has layers that can be checkpointed individually, and none is."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    switched = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return training_step.has_checkpointing(unwrap(model)) and bool(layers) and not switched


def drops_itself(module: nn.Module) -> bool:
    """True if a module has its own dropout share, outside of any dropout submodule."""
    return any(isinstance(share, float) and share > 0 and "drop" in name for name, share in vars(module).items())


def all_running_again(model: nn.Module) -> Callable[[], None]:
    """Checkpoint all layers of a model; return a function that undoes it.

    Raises:
        UnsupportedError: the model has no gradient checkpointing.
    """
    before, base = ModelSettings(model), unwrap(model)
    training_step.switch_checkpointing(base, True)
    base.config.use_cache = False
    return before.put_back
