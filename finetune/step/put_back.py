"""Snapshots of what a measured step or a failed one may change, and their restoration.

These are adapters, settings and attributes of objects; random states, modes, buffers and gradients.
"""

from __future__ import annotations

import copy
import gc
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ...cost.savers.checkpointed_layers import settings_put_back
from ...data.batches import Collate
from ...lora.optimizer_state import OptimizerSnapshot, state_bytes_of
from ...lora.resize import shrink_maps, update_peft_records, write_in_place
from ...lora.spec import REFERENCE_RANK
from ...lora.targets import TargetModule, other_trainable, unwrap
from .known_losses import is_of_library


def adapter_bytes(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the adapters' factors, their gradients and their optimizer state."""
    factors = [weight.detach() for target in targets for weight in (target.weight_a, target.weight_b) if target.rank]
    return sum(2 * factor.nbytes + state_bytes_of(optimizer, factor) for factor in factors)


class AdapterSnapshot:
    """Snapshot of a model's adapters, PEFT's configuration and the optimizer's state, in main memory.

    Args:
        model: the PEFT model.
        targets: its target modules.
        optimizer: its optimizer; None for none.
        steps: True if the optimizer steps before `put_back`. A head trained with the adapters is then included.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[TargetModule],
        optimizer: torch.optim.Optimizer | None,
        *,
        steps: bool = False,
    ) -> None:
        self._targets, self._configs = targets, unwrap(model).peft_config
        parameters = [parameter for target in targets for parameter in target.parameters.values()]
        parameters += other_trainable(model, targets) if steps else []
        self._values = [(p, p.detach().to("cpu", copy=True), p.requires_grad) for p in parameters]
        self._settings = {name: copy.deepcopy(vars(config)) for name, config in self._configs.items()}
        self._state = OptimizerSnapshot(optimizer, parameters, steps=steps)

    @property
    def fits(self) -> bool:
        """True if no parameter's shape, and so no rank, has changed."""
        return all(parameter.shape == value.shape for parameter, value, _ in self._values)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state for `load_state_dict`, as tensors and JSON values; None if the optimizer's state is not."""
        state = self._state.state_dict()
        values = {str(i): value for i, (_, value, _) in enumerate(self._values)}
        return None if state is None else {"values": values, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the snapshot by the result of `state_dict`, at the same ranks.

        Raises:
            LookupError, TypeError, ValueError: it belongs to other modules or ranks.
        """
        kept = []
        for index, (parameter, now, trains) in enumerate(self._values):
            if (value := state["values"][str(index)]).shape != now.shape or value.dtype != now.dtype:
                raise ValueError(f"a copy of shape {tuple(value.shape)} and {value.dtype}, not {tuple(now.shape)}")
            kept.append((parameter, value, trains))
        self._values = kept
        self._state.load_state_dict(state["state"])

    def put_back(self) -> None:
        """Restore everything, after any changes of rank; this works once."""
        self._state.put_back()
        for parameter, value, _ in self._values:
            write_in_place(parameter, value.to(parameter.device))
        for target in self._targets:
            update_peft_records(target, target.rank)
        for parameter, _, trains in self._values:
            parameter.requires_grad_(trains)
        for name, settings in self._settings.items():
            vars(self._configs[name]).clear()
            vars(self._configs[name]).update(settings)


@dataclass(frozen=True, eq=False)
class CutDirections:
    """Directions of a module's pair kept in main memory while they are cut.

    Attributes:
        target: the module.
        rows: rows of A, (experts, directions, d_in).
        columns: columns of B, (experts, d_out, directions).
        scaling: factor of their product.
    """

    target: TargetModule
    rows: torch.Tensor
    columns: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, target: TargetModule) -> CutDirections:
        """Return all directions of a module."""
        a, b = (weight.detach().to("cpu", copy=True) for weight in (target.weight_a, target.weight_b))
        return cls(target, target.each_a(a), target.each_b(b), target.scaling)

    def beyond(self, rank: int) -> CutDirections:
        """Return the directions removed by a shrink to this rank, largest first; see `shrink_maps`."""
        a, b = self.rows.double(), self.columns.double()
        share = self.scaling / (self.target.scaling_at(REFERENCE_RANK) or 1.0)
        p, q, used = shrink_maps([*a], [*(b * share)], a.shape[1])
        kept = used[:, rank:].any(dim=0)
        rows, columns = q[:, rank:][:, kept] @ a, b @ p[:, :, rank:][:, :, kept]
        return replace(self, rows=rows.to(self.rows), columns=columns.to(self.columns))

    @torch.no_grad()
    def put_back(self, at: int) -> int:
        """Write the directions into a pair from index `at` up to its rank; return the end index."""
        target, end = self.target, min(at + self.rows.shape[1], self.target.rank)
        factor = target.scaling / self.scaling if self.scaling else 1.0
        rows, columns = self.rows[:, : end - at], self.columns[:, :, : end - at]
        each_a, each_b = target.each_a(target.weight_a), target.each_b(target.weight_b)
        each_a[:, at:end] = (rows / factor if target.embedding else rows).to(target.weight_a)
        each_b[:, :, at:end] = (columns if target.embedding else columns / factor).to(target.weight_b)
        return end


LONG = 10_000
"""Lists longer than this hold data, not records of steps."""


@contextmanager
def put_back(*owners: object) -> Iterator[None]:
    """Restore the attributes of objects, and the lists and dictionaries in them."""
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
    """Record the content of a container and of nested ones."""
    if not isinstance(value, dict | list | deque | set) or len(value) > LONG or id(value) in containers:
        return
    containers[id(value)] = value, value.copy()
    for item in value.values() if isinstance(value, dict) else value:
        _note(item, containers)


_ABSENT: Any = object()


@contextmanager
def standing(thing: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of an object."""
    attributes = vars(thing)
    before, attributes[name] = attributes.get(name, _ABSENT), function
    try:
        yield
    finally:
        _put_back(attributes, name, before)


def _put_back(attributes: dict[str, Any], name: str, before: Any) -> None:
    """Restore an attribute of an object, or remove it if it was absent."""
    if before is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = before


class ReplacedMethods:
    """Methods of an object that are replaced until `release`.

    Args:
        owner: the object.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._ours: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}

    def replace(self, name: str, function: Callable[..., Any]) -> None:
        """Replace a method by a function that gets the original as its first argument."""
        attributes, run = vars(self._owner), getattr(self._owner, name)
        self._before.setdefault(name, attributes.get(name, _ABSENT))

        def ours(*arguments: Any, **options: Any) -> Any:
            function_now = partial(function, run) if self._ours.get(name) is ours else run
            return function_now(*arguments, **options)

        self._ours[name] = attributes[name] = ours

    def before(self) -> dict[str, Any]:
        """Return the functions set on the object before those that still replace them; None for a usual method."""
        names = [name for name, own in self._ours.items() if vars(self._owner).get(name) is own]
        return {name: None if self._before[name] is _ABSENT else self._before[name] for name in names}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reduce our functions to calls of the originals: a measured step is not part of the run."""
        ours, self._ours = self._ours, {}
        try:
            yield
        finally:
            self._ours = ours

    def release(self) -> None:
        """Put the methods back."""
        attributes = vars(self._owner)
        for name, before in self._before.items():
            if attributes.get(name) is self._ours[name]:  # else it was replaced since, and may still call ours
                _put_back(attributes, name, before)
        self._ours.clear()
        self._before.clear()


@contextmanager
def switches_put_back(model: torch.nn.Module) -> Iterator[None]:
    """Restore trainable parameters, training modes and torch's random states afterwards."""
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
    model: Any, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None, *, after_errors: bool = False
) -> Iterator[AdapterSnapshot]:
    """Restore the adapters, their ranks, PEFT's configuration and the optimizer's state afterwards.

    Args:
        model: the PEFT model.
        targets: its target modules.
        optimizer: its optimizer; None for none.
        after_errors: restore only after an error inside, such as Ctrl-C in the probe.
    """
    kept = AdapterSnapshot(model, targets, optimizer)
    try:
        yield kept
    except BaseException:
        kept.put_back()
        raise
    if not after_errors:
        kept.put_back()


def random_states() -> Callable[[], None]:
    """Return a function to restore the current states of all random number generators."""
    python, numpy, of_torch = random.getstate(), np.random.get_state(), torch_random_states()  # noqa: NPY002

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        of_torch()

    return put_back


def torch_random_states() -> Callable[[], None]:
    """Return a function to restore the current states of torch's random number generators."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


@contextmanager
def undisturbed(collate: Collate, dataset: Any, *others: Any) -> Iterator[None]:
    """Restore random states afterwards, so that the run draws the same numbers as without measurements.

    This includes the generators and attributes of the user's objects. A compiled model runs uncompiled inside: each
    tried plan would take one of torch's few cached graphs.

    Args:
        collate: the collator.
        dataset: the data set.
        others: further objects that a step runs, such as the loss, and the user's modules and hooks.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (a user's collator may draw from it)
    own = _generators(collate, dataset, *others)
    states = [copy.deepcopy(_state_of(generator)) for generator in own]
    owners = [collate, getattr(collate, "__self__", None), *(each for each in others if isinstance(each, nn.Module))]
    for owner in owners:  # transformers' collators create their generator with the first batch, also inside another
        inside = [each for each in getattr(owner, "__dict__", {}).values() if callable(each)]
        inside = [each for each in inside if not isinstance(each, type | nn.Module | FunctionType)]
        owners += [each for each in inside if all(each is not own for own in owners)]
    attributes = list[tuple[dict[str, Any], dict[str, Any]]]()
    while isinstance(now := getattr(dataset, "__dict__", None), dict) and len(attributes) < MOST_WRAPPERS:
        attributes.append((now, dict(now)))
        dataset = now.get("dataset")
    try:
        with (
            put_back(*owners),
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for generator, state in zip(own, states, strict=True):
            _set_state(generator, state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Random generators possibly held by a user's objects."""

MOST_WRAPPERS = 8
"""Data sets inside another, as in torch's `Subset`."""

MOST_OBJECTS = 20_000
"""Objects looked at in a search for generators."""


def _generators(*roots: Any) -> list[Any]:
    """Return the random generators that objects hold: in attributes, lists, closures and globals of their code.

    The search leaves out tensors, modules of the model other than the roots, long lists, and code of libraries.
    """
    queue, seen, found = deque(roots), dict[int, Any](), []
    for module in (each for each in roots if isinstance(each, nn.Module)):
        queue += [*vars(module).values(), type(module)]
    while queue and len(seen) < MOST_OBJECTS:
        one = queue.popleft()
        if id(one) in seen or isinstance(one, nn.Module | torch.Tensor | np.ndarray | ModuleType):
            continue
        seen[id(one)] = one  # which keeps the number its own
        if isinstance(one, GENERATORS):
            found.append(one)
        elif isinstance(one, FunctionType):
            queue += [*(one.__closure__ or ()), *(one.__defaults__ or ()), *vars(one).values()]
            codes = [] if is_of_library(one.__module__) else [one.__code__]
            for code in codes:
                codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
                queue += [one.__globals__[name] for name in code.co_names if name in one.__globals__]
        elif isinstance(one, type):
            queue += [] if is_of_library(one.__module__) else [*vars(one).values(), *one.__bases__]
        elif not isinstance(one, list | tuple | dict | set | deque) or len(one) <= LONG:
            queue += gc.get_referents(one)
    return found


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
