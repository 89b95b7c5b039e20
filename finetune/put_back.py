"""What a run changes in a user's model and Trainer beside the ranks: checkpointed layers, and all that is put back."""

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

from ..common.arrays import FloatArray, IntArray
from ..cost import training_step
from ..cost.cost import ByteCost
from ..cost.model import MemoryModel, checkpointed_cost, fewest_checkpointed
from ..cost.recording import BatchShape
from ..errors import UnsupportedError
from ..lora.optimizer_state import OptimizerSnapshot, state_bytes_of
from ..lora.resize import shrink_maps, update_peft_records, write_in_place
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule, other_trainable, unwrap


def adapter_bytes(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the adapters' factors, their gradients and their optimiser state."""
    factors = [weight.detach() for target in targets for weight in (target.weight_a, target.weight_b) if target.rank]
    return sum(2 * factor.nbytes + state_bytes_of(optimizer, factor) for factor in factors)


class AdapterSnapshot:
    """The adapters of a model at this moment, PEFT's configuration and the optimiser's state, in main memory.

    Args:
        model: the PEFT model.
        targets: its target modules.
        optimizer: its own; None for none.
        steps: whether it steps before `put_back`. Then a head that trains beside the adapters is kept, too.
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
        """Whether the parameters have the shapes that they had, so that no rank has changed."""
        return all(parameter.shape == value.shape for parameter, value, _ in self._values)

    def state_dict(self) -> dict[str, Any] | None:
        """What `load_state_dict` needs, as tensors and JSON values; None where the optimizer's state is no such."""
        state = self._state.state_dict()
        values = {str(i): value for i, (_, value, _) in enumerate(self._values)}
        return None if state is None else {"values": values, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what `state_dict` told instead of what is there now, at the same ranks.

        Raises:
            LookupError, TypeError, ValueError: it is of other modules or ranks.
        """
        kept = []
        for index, (parameter, now, trains) in enumerate(self._values):
            if (value := state["values"][str(index)]).shape != now.shape or value.dtype != now.dtype:
                raise ValueError(f"a copy of shape {tuple(value.shape)} and {value.dtype}, not {tuple(now.shape)}")
            kept.append((parameter, value, trains))
        self._values = kept
        self._state.load_state_dict(state["state"])

    def put_back(self) -> None:
        """Give all of it back, after any changes of rank; this can be done once."""
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
    """Directions of a module's pair in main memory, which are cut away for a while.

    Attributes:
        target: the module.
        rows: of A, (experts, directions, d_in).
        columns: of B, (experts, d_out, directions).
        scaling: by which their product is multiplied.
    """

    target: TargetModule
    rows: torch.Tensor
    columns: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, target: TargetModule) -> CutDirections:
        """All directions of a module."""
        a, b = (weight.detach().to("cpu", copy=True) for weight in (target.weight_a, target.weight_b))
        return cls(target, target.each_a(a), target.each_b(b), target.scaling)

    def beyond(self, rank: int) -> CutDirections:
        """Those that a shrink to this rank takes, the largest first; see `shrink_maps`."""
        a, b = self.rows.double(), self.columns.double()
        share = self.scaling / (self.target.scaling_at(REFERENCE_RANK) or 1.0)
        p, q, used = shrink_maps([*a], [*(b * share)], a.shape[1])
        kept = used[:, rank:].any(dim=0)
        rows, columns = q[:, rank:][:, kept] @ a, b @ p[:, :, rank:][:, :, kept]
        return replace(self, rows=rows.to(self.rows), columns=columns.to(self.columns))

    @torch.no_grad()
    def put_back(self, at: int) -> int:
        """Write them into a pair from direction `at` on, as many as it has room for; returns where they end."""
        target, end = self.target, min(at + self.rows.shape[1], self.target.rank)
        factor = target.scaling / self.scaling if self.scaling else 1.0
        rows, columns = self.rows[:, : end - at], self.columns[:, :, : end - at]
        each_a, each_b = target.each_a(target.weight_a), target.each_b(target.weight_b)
        each_a[:, at:end] = (rows / factor if target.embedding else rows).to(target.weight_a)
        each_b[:, :, at:end] = (columns if target.embedding else columns / factor).to(target.weight_b)
        return end


LONG = 10_000
"""Lists that are longer hold data, not records of steps."""


_SWITCHES = ("gradient_checkpointing", training_step.CHECKPOINT)
"""Attributes of a module that say whether it is checkpointed, and how."""


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
    """Which layers of a transformers model are checkpointed, which outputs require gradients, and its cache.

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
        self.put_back_caches()

    def put_back_caches(self) -> None:
        """Let the model fill caches of keys and values as it did."""
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
    model: Any, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None, *, after_errors: bool = False
) -> Iterator[AdapterSnapshot]:
    """Give the adapters their values, ranks, PEFT's configuration and the optimiser's state back afterwards.

    Args:
        model: the PEFT model.
        targets: its target modules.
        optimizer: its own; None for none.
        after_errors: do so only after an error inside, such as Ctrl-C in the probe.
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
    """The hooks that make a module's output require gradients."""
    return {key: hook for key, hook in module._forward_hooks.items() if training_step.requires_grad_hook(hook)}


class LayerCheckpointing:
    """Checkpoints single layers of a transformers model. Losses stay the same.

    Args:
        model: the PEFT model. All its layers are checkpointed until `put_back`, so that the step can be measured.
        whole: checkpoint all that hold something, whatever the limit: for the fewest bytes.

    Attributes:
        layers: the names of the checkpointed layers.
        memory: the byte model of the step in which all are; None until it is known.

    Raises:
        UnsupportedError: the model has no layers that can be checkpointed one by one.
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
        """Checkpoint the layers that were so before, and set the model's cache as it was; the first call does so."""
        if self._before:
            self._before.put_back()
            for layer in self._layers.values():  # as what is in them: see `before_step`
                layer.training = next(layer.children(), layer).training
        self._before = None

    def before_step(self) -> None:
        """Let the chosen layers be in training mode, since transformers checkpoints no other; what is in them stays.

        Layers that drop numbers themselves stay as they are, as without rankpilot.
        """
        for layer in map(self._layers.__getitem__, self.layers):
            layer.training = layer.training or not drops_itself(layer)

    def pause(self) -> None:
        """Checkpoint no layer, and have the cache of before; call inside `settings_put_back`."""
        for layer in self._layers.values():
            layer.gradient_checkpointing = False
        if self._before:
            self._before.put_back_caches()

    def all(self) -> None:
        """Checkpoint all layers."""
        self.take(self._layers)

    def take(self, layers: Collection[str]) -> None:
        """Checkpoint these layers, and no other."""
        self.layers = tuple(name for name in self._layers if name in layers)
        for name, layer in self._layers.items():
            layer.gradient_checkpointing = name in layers

    def fewest(self, ranks: IntArray, limit: float, shape: BatchShape | None = None) -> tuple[str, ...]:
        """The fewest layers that must be checkpointed so that a plan fits, or all that hold something.

        Args:
            ranks: the plan, int64 (modules,).
            limit: bytes that the step may take.
            shape: of the batch; by default the one that the memory was measured with.
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
        """What plans cost, where layers may be checkpointed or may not; see `checkpointed_cost`.

        Args:
            max_ranks: the highest rank of each module, int64 (modules,).
            limit: bytes that the step may take.
            shape: of the batch.
            ranks: those in place, int64 (modules,).
            least: what the least possible plan takes under a cost; None where no layer may be checkpointed.
            unpaid: bytes for each rank that are in the cost and that the plans do not take, (modules,).
        """
        assert self.memory is not None, "the step has not been measured"
        if least:
            cost = checkpointed_cost(
                self.memory, max_ranks, limit, shape, ranks, least=least, whole=self.whole, unpaid=unpaid
            )
            return replace(cost, per_rank=cost.per_rank + unpaid)
        return self.memory.with_checkpointed(()).cost(shape)

    def memory_now(self) -> MemoryModel:
        """The byte model of the step in which the layers are checkpointed that are now."""
        assert self.memory is not None, "the step has not been measured"
        return self.memory.with_checkpointed(self.layers)

    def __str__(self) -> str:
        return f"{len(self.layers)} of {len(self._layers)} layers use gradient checkpointing"


def could_checkpoint(model: nn.Module) -> bool:
    """Whether a model has layers that can be checkpointed one by one, and none that is."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    switched = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return training_step.has_checkpointing(unwrap(model)) and bool(layers) and not switched


def drops_itself(module: nn.Module) -> bool:
    """Whether a module has a share of numbers to drop that no module of dropout inside of it tells."""
    return any(isinstance(share, float) and share > 0 and "drop" in name for name, share in vars(module).items())


def all_running_again(model: nn.Module) -> Callable[[], None]:
    """Checkpoint all layers of a model; returns what undoes it.

    Raises:
        UnsupportedError: the model has no gradient checkpointing.
    """
    before, base = ModelSettings(model), unwrap(model)
    training_step.switch_checkpointing(base, True)
    base.config.use_cache = False
    return before.put_back
