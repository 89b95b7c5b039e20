"""Puts back what measured steps and planned runs change in a user's Trainer, collator, model and adapters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..cost.training_step import CHECKPOINT, requires_grad_hook
from ..lora.targets import TargetModule
from .out_of_memory import Kept

LONG = 10_000
"""Lists that are longer hold data, not records of steps."""


_SWITCHES = ("gradient_checkpointing", CHECKPOINT, "_loss_function")
"""Attributes of a module that say whether it runs again in the backward pass, and how, and what computes its loss."""


@contextmanager
def put_back(*owners: object) -> Iterator[None]:
    """Put back what is written into the attributes of objects, and into the lists and dictionaries that they hold."""
    every = [own for owner in owners if isinstance(own := getattr(owner, "__dict__", None), dict)]
    before = [(attributes, dict(attributes)) for attributes in every]
    containers: dict[int, tuple[Any, Any]] = {}
    for attributes in every:
        for value in attributes.values():
            _note(value, containers)
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)
        for container, content in containers.values():
            container.clear()
            container.extend(content) if isinstance(container, list | deque) else container.update(content)


def _note(value: Any, containers: dict[int, tuple[Any, Any]]) -> None:
    """Note the content of a container and of those inside it."""
    if not isinstance(value, dict | list | deque | set) or len(value) > LONG or id(value) in containers:
        return
    containers[id(value)] = value, value.copy()
    for item in value.values() if isinstance(value, dict) else value:
        _note(item, containers)


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


@contextmanager
def switches_put_back(model: torch.nn.Module) -> Iterator[None]:
    """Let parameters train, modules be in training mode and torch draw numbers afterwards as they did before."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with settings_put_back(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, before in trains:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.training = training


@contextmanager
def adapters_put_back(
    model: Any, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None
) -> Iterator[None]:
    """Give the adapters their values, ranks, PEFT's configuration and the optimiser's state back afterwards."""
    kept = Kept(model, targets, optimizer)
    try:
        yield
    finally:
        kept.put_back()


def _switches(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _SWITCHES if name in vars(module)}


def _gradient_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks that make a module's output require gradients."""
    return {key: hook for key, hook in module._forward_hooks.items() if requires_grad_hook(hook)}
