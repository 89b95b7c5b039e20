"""Changes to a user's model and Trainer other than ranks (checkpointed layers, settings), and their restoration."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...common.arrays import FloatArray, IntArray
from ...common.errors import UnsupportedError
from ...cost import training_step
from ...cost.cost import ByteCost
from ...cost.model import MemoryModel, checkpointed_cost, fewest_checkpointed
from ...cost.recording import BatchShape
from ...lora.optimizer_state import OptimizerSnapshot, state_bytes_of
from ...lora.resize import shrink_maps, update_peft_records, write_in_place
from ...lora.spec import REFERENCE_RANK
from ...lora.targets import TargetModule, other_trainable, unwrap


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


_SWITCHES = ("gradient_checkpointing", training_step.CHECKPOINT)
"""Attributes of a module that control whether and how it is checkpointed."""


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
        memory: the byte model of the step with all layers checkpointed; None until known.

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
                f"{type(base).__name__} checkpoints all its layers together or none, so a plan cannot choose them one "
                "by one: gradient_checkpointing is True or False for it."
            )
        self._before: ModelSettings | None = ModelSettings(model)
        training_step.switch_checkpointing(base, True)
        base.config.use_cache = False  # a checkpointed layer would fill the cache twice
        self.layers: tuple[str, ...] = tuple(self._layers)
        self.memory: MemoryModel | None = None

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
        self.layers = tuple(name for name in self._layers if name in layers)
        for name, layer in self._layers.items():
            layer.gradient_checkpointing = name in layers

    def fewest(self, ranks: IntArray, limit: float, shape: BatchShape | None = None) -> tuple[str, ...]:
        """Return the fewest checkpointed layers with which a plan fits, or all layers with saved activations.

        Args:
            ranks: the plan, int64 (modules,).
            limit: limit of the step in bytes.
            shape: the shape of the batch; defaults to the one measured.
        """
        assert self.memory is not None, "the step has not been measured"
        return fewest_checkpointed(self.memory, ranks, 0.0 if self.whole else limit, shape)

    def cost(
        self,
        max_ranks: IntArray,
        limit: float,
        shape: BatchShape,
        ranks: IntArray,
        least: Callable[[ByteCost], float] | None,
        unpaid: FloatArray,
    ) -> ByteCost:
        """Return the cost of plans, with or without selectable layers; see `checkpointed_cost`.

        Args:
            max_ranks: the highest rank of each module, int64 (modules,).
            limit: limit of the step in bytes.
            shape: the shape of the batch.
            ranks: the current ranks, int64 (modules,).
            least: returns the least cost of any plan; None if no layer may be checkpointed.
            unpaid: bytes per rank that are in the cost but not used by the plans, (modules,).
        """
        assert self.memory is not None, "the step has not been measured"
        if least:
            cost = checkpointed_cost(
                self.memory, max_ranks, limit, shape, ranks, least=least, whole=self.whole, unpaid=unpaid
            )
            return replace(cost, per_rank=cost.per_rank + unpaid)
        return self.memory.with_checkpointed(()).cost(shape)

    def memory_now(self) -> MemoryModel:
        """Return the byte model of the step with the current checkpointed layers."""
        assert self.memory is not None, "the step has not been measured"
        return self.memory.with_checkpointed(self.layers)

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
