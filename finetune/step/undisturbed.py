"""Restores the state of a run around measured steps: random states, modes, buffers, gradients."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data.batches import Collate
from ...lora.targets import unwrap
from .put_back import put_back


@contextmanager
def undisturbed(collate: Collate) -> Iterator[None]:
    """Restore random states afterwards, so that the run draws the same numbers as without measurements.

    This includes a collator's generators and attributes. A compiled model runs uncompiled inside: each tried plan would
    take one of torch's few cached graphs.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (a user's collator may draw from it)
    owners = list(_owners(collate))
    own = [value for owner in owners for value in _held(owner) if isinstance(value, GENERATORS)]
    states = [copy.deepcopy(_state_of(generator)) for generator in own]
    try:
        with (
            put_back(*owners),  # transformers' collators create their generator with the first batch
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for generator, state in zip(own, states, strict=True):
            _set_state(generator, state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Random generators possibly held by a user's objects."""


def _owners(collate: Any, depth: int = 3) -> Iterator[Any]:
    """Yield a collator and its callable attributes, such as the user's collator inside one wrapped by the Trainer."""
    yield collate
    if depth:
        inside = (getattr(collate, "__self__", None), getattr(collate, "func", None))
        for value in (*inside, *_in_closure(collate), *getattr(collate, "__dict__", {}).values()):
            if callable(value) and not isinstance(value, type | nn.Module):
                yield from _owners(value, depth - 1)


def _held(owner: Any) -> Iterator[Any]:
    """Yield the attributes of a callable, and the variables of its closure and module used by its code."""
    yield from getattr(owner, "__dict__", {}).values()
    yield from _in_closure(owner)
    called = owner if hasattr(owner, "__code__") else type(owner).__call__
    if code := getattr(called, "__code__", None):
        yield from (called.__globals__[name] for name in code.co_names if name in called.__globals__)


def _in_closure(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if cell != CellType()]  # which is empty


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextmanager
def gradients_put_back(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Clear the gradients of parameters inside, and restore them afterwards."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _base(model: nn.Module) -> nn.Module:
    find = getattr(unwrap(model), "get_base_model", None)
    base: nn.Module = find() if find else model
    return base


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode inside; restore modes, buffers and numbers of modules afterwards.

    These are running statistics, and the length up to which a rotary embedding is cached.

    Parts of a training model that its user put into evaluation mode stay so.
    """
    numbers = [
        (own, {name: value for name, value in own.items() if name == "training" or type(value) in (int, float)})
        for own in map(vars, model.modules())
    ]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    if not (model.training and _base(model).training):  # a loaded model is in evaluation mode inside PEFT
        model.train()
    try:
        yield
    finally:
        for own, before in numbers:
            own.update(before)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)
