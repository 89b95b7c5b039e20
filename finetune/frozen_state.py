"""What frozen layers return depends on more than their inputs: weights, hooks, modes, settings. Has any of it changed?

That is asked before every forward pass, so all of it is read from flat lists that are made once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import Any, TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.text import plural
from ..cost.training_step import CHECKPOINT
from ..lora.targets import unwrap

Modules = Mapping[str, nn.Module]
"""Modules by name, each with those inside of it."""

SAMPLED, WHOLE = 2, 4096
"""How many numbers of a tensor are compared, and how many a buffer has at most for all of them to be."""

_CONTENTS = {"_modules", "_parameters", "_buffers"}
_HOOKS = {"_forward_hooks", "_forward_pre_hooks"}
_UNREAD = vars(nn.Module()).keys() | {"gradient_checkpointing", CHECKPOINT, "warnings_issued"}
_UNREAD |= {"_active_adapter", "_disable_adapters"}
"""Attributes of modules that are no settings of theirs; `adapters_in_use` tells of the last two."""

_READ_SETTINGS = ("attn", "attention", "drop", "window", "causal")
"""What is in the names of settings that a model reads in its forward pass."""

_QUIET = ("transformers.", "rankpilot.")
"""Whose hooks may be left out with their layer: they collect outputs that are asked for, or keep rank 0 frozen."""


class FrozenState:
    """Modules that do not train, as they are now.

    Weights are known by object, address, version and a few numbers: a change of `weight.data` raises no version, and
    processes that send their buffers in each pass raise theirs.

    Args:
        modules: all that inputs pass through.
        config: the settings of their model.
    """

    def __init__(self, modules: Modules, config: object) -> None:
        held: list[tuple[str, Any]] = []
        for name, own in ((name, vars(module)) for name, module in modules.items()):
            held += [(name, own), *((name, own[kind]) for kind in _CONTENTS)]
            held += [(_path(name, kind), own[kind]) for kind in _HOOKS]
            held += [(_path(name, key), each) for key, each in own.items() if _is_list(each) and key not in _UNREAD]
        self._owners, self._holders = [name for name, _ in held], [holder for _, holder in held]
        places = [(name, holder, key) for name, holder in held if isinstance(holder, dict) for key in holder]
        settings = getattr(config, "__dict__", {})
        read = [key for key in settings if any(part in key for part in _READ_SETTINGS) and "output" not in key]
        places = [place for place in places if not _is_fixed(*place[1:])] + [("config", settings, key) for key in read]
        self._names = [_path(name, str(key)) for name, _, key in places]
        self._places = [(holder, key) for _, holder, key in places]
        self._sizes, self._values = [*map(len, self._holders)], [holder.get(key) for holder, key in self._places]
        unique = {id(each): name for name, each in zip(self._names, self._values, strict=True)}
        named = {name: each for name, each in zip(self._names, self._values, strict=True) if unique[id(each)] == name}
        self._parameters = {name: each for name, each in named.items() if isinstance(each, nn.Parameter)}
        self._tensors = {name: each for name, each in named.items() if _is_plain(each)}
        self._weights = {name: each for name, each in self._parameters.items() if name in self._tensors}
        self._samples: dict[Hashable, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, each in self._tensors.items():
            self._samples[each.device, each.dtype][name] = _sample(each)
        self._addresses, self._versions, self._numbers = self._marks()

    def change(self) -> str:
        """What has changed since this was made, in words; empty for nothing."""
        if True in [each.requires_grad for each in self._parameters.values()]:
            return next(f"{name} trains now" for name, each in self._parameters.items() if each.requires_grad)
        changed = self._other_part() or self._other_number()
        return f"{changed} changed" if changed else ""

    def _other_part(self) -> str:
        sizes, values = [*map(len, self._holders)], [holder.get(key) for holder, key in self._places]
        if sizes == self._sizes and all(map(is_, values, self._values)):
            return ""
        before, self._values = self._values, values  # some are other objects of the same value
        return _first(self._owners, sizes, self._sizes) or _first(self._names, values, before)

    def _marks(self) -> tuple[list[int], list[int], list[torch.Tensor]]:
        addresses = [each.data_ptr() for each in self._tensors.values()]
        versions = [each._version for each in self._weights.values()]
        return addresses, versions, [torch.cat([*group.values()]) for group in self._samples.values()]

    def _other_number(self) -> str:
        addresses, versions, numbers = self._marks()
        if addresses != self._addresses or versions != self._versions:
            other = _first([*self._tensors], addresses, self._addresses)
            return other or _first([*self._weights], versions, self._versions)
        for group, now, then in zip(self._samples.values(), numbers, self._numbers, strict=True):
            if not _same_bits(now, then):
                sizes = [len(view) for view in group.values()]
                pairs = zip(group, torch.split(now, sizes), torch.split(then, sizes), strict=True)
                return next(name for name, one, other in pairs if not _same_bits(one, other))
        return ""


def modules_below(body: nn.Module, above: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The modules of a model without some layers, and without adapters that hold no numbers: those add nothing."""
    others = [*above]
    for layer in body.modules():
        if isinstance(layer, BaseTunerLayer) and not _holds_numbers(layer):
            others += [child for name, child in layer.named_children() if name != "base_layer"]
    left = {id(module) for other in others for module in other.modules()}
    return {name: module for name, module in body.named_modules() if id(module) not in left}


def _holds_numbers(layer: BaseTunerLayer) -> bool:
    return any(p.numel() for name in layer.adapter_layer_names for p in getattr(layer, name).parameters())


def adapted(modules: Modules) -> list[BaseTunerLayer]:
    """The layers of PEFT among some modules that have an adapter with numbers."""
    return [each for each in modules.values() if isinstance(each, BaseTunerLayer) and _holds_numbers(each)]


def adapters_in_use(layers: Sequence[BaseTunerLayer]) -> Hashable:
    """Which adapters layers of PEFT use now."""
    return tuple((layer._disable_adapters, str(layer._active_adapter)) for layer in layers)


def heard_by(layers: Sequence[nn.Module]) -> str:
    """Which layer has a user's hook inside, or a forward pass of its own, which sees all its passes; empty for none."""
    for index, layer in enumerate(layers):
        hooks = [
            hook
            for each in layer.modules()
            for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values())
        ]
        if "forward" in vars(layer) or not all(str(getattr(h, "__module__", "")).startswith(_QUIET) for h in hooks):
            return f"layer {index}"
    return ""


def _path(name: str, key: str) -> str:
    return f"{name}.{key}".lstrip(".")


def _is_fixed(holder: Mapping[str, Any], key: str) -> bool:
    """Whether something is no setting, or a size, which the forward pass does not read or nobody changes."""
    return key in _UNREAD or (type(holder[key]) is int and "drop" not in key)


def _is_list(value: object) -> bool:
    return isinstance(value, dict | list | set)


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether something is a tensor whose address, version and numbers can be read."""
    return (
        isinstance(value, torch.Tensor)
        and type(value.data) is torch.Tensor
        and not (value.is_meta or value.is_inference())
    )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of some numbers of a tensor, or of all if it is a small buffer."""
    if not tensor.is_contiguous():
        return tensor.data.reshape(-1)[:0]
    whole = not isinstance(tensor, nn.Parameter) and tensor.numel() <= WHOLE
    return tensor.data.view(-1)[:: 1 if whole else max(1, -(-tensor.numel() // SAMPLED))]


def _first(names: Sequence[str], now: Sequence[Any], then: Sequence[Any]) -> str:
    """The name of the first that is another; empty for none."""
    return next((name for name, one, other in zip(names, now, then, strict=True) if not _equal(one, other)), "")


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or (not isinstance(one, torch.Tensor) and bool(one == other))
    except (RuntimeError, TypeError, ValueError):  # of what tells no truth, such as several numbers
        return False


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def layers_in_order(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The part of a transformers model below its head, and its layers.

    Raises:
        LookupError: they cannot be found, and why.
    """
    base = unwrap(model)
    body = getattr(getattr(base, "base_model", base), "model", base)
    body = getattr(body, "base_model", body)
    lists = [
        [*module]
        for module in body.modules()
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer)
    ]
    if len(lists) != 1:
        raise LookupError(f"{type(body).__name__} has {plural(len(lists), 'stack')} of layers, not one")
    if any("forward" in vars(layer) for layer in lists[0]):
        raise LookupError(f"something has replaced the forward pass of layers of {type(body).__name__}")
    return body, lists[0]


def drops_itself(module: nn.Module) -> bool:
    """Whether a module has a share of numbers to drop that no module of dropout inside of it tells."""
    return any(isinstance(share, float) and share > 0 and "drop" in name for name, share in vars(module).items())


def random_parts(body: nn.Module, above: Sequence[nn.Module]) -> str:
    """What makes the layers below some others return something else each time in training; empty for nothing."""
    later = {id(module) for layer in above for module in layer.modules()}
    below = [module for module in body.modules() if id(module) not in later]
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in below):
        return "they drop some numbers at random (dropout)"
    config = vars(getattr(body, "config", body))
    shares = (config.get(name) for name in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"))
    if any(isinstance(share, float) and share > 0 for share in shares):
        return "their attention drops some numbers at random (dropout)"
    if any(map(drops_itself, below)):
        return "they drop some numbers at random (dropout)"
    if any(getattr(module, "neftune_noise_alpha", None) for module in below):
        return "their embeddings get noise (NEFTune)"
    return ""
