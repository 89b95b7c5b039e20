"""Adapter files that plain PEFT loads, and models that load adapters of any ranks back.

PEFT builds an adapter from `adapter_config.json` before it reads the weights, so the configuration must tell each
module's rank and alpha. A stock model refuses weights of another rank; `make_resizable` lets it take them, which
is what resuming and `load_best_model_at_end` need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from .frozen_weights import guard_base
from .resize import resize
from .targets import TargetModule, unwrap

MANY_MODULES = 256
"""PEFT tries every pattern on every module, and Python's `re` remembers 512 of them: with more, loading an adapter
takes minutes. From this number on, modules of one rank share a pattern."""


@dataclass(frozen=True)
class _UserSettings:
    """What the user's LoraConfig said before our first change of it."""

    exclude_modules: Any
    target_modules: Any


def sync_config(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """Write the current ranks into the model's LoraConfig, so that any save from now on is right.

    Adapted modules get anchored `rank_pattern` and `alpha_pattern` entries; modules at rank 0 are listed in
    `exclude_modules`. The user's own patterns go: PEFT sorts them on saving, and the first match wins.
    """
    peft_model = unwrap(model)
    adapter = targets[0].adapter
    config = peft_model.peft_config[adapter]
    settings = peft_model.__dict__.setdefault("_rankpilot_user_settings", {})
    user = settings.setdefault(adapter, _UserSettings(config.exclude_modules, config.target_modules))
    live = [target for target in targets if target.rank > 0]
    config.rank_pattern = _patterns({t.name: t.rank for t in live})
    config.alpha_pattern = _patterns({t.name: t.layer.lora_alpha[adapter] for t in live})
    config.exclude_modules = _excluded(user.exclude_modules, [target.name for target in targets if target.rank == 0])
    # An adapter of no module at all is one that PEFT would not load under any real name.
    config.target_modules = user.target_modules if live else DUMMY_TARGET_MODULES
    if config.init_lora_weights == "orthogonal":  # not possible at odd ranks, and of no use to whoever loads
        config.init_lora_weights = True


def _patterns(values: dict[str, Any]) -> dict[str, Any]:
    """PEFT's pattern dictionary for these values by module name."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value if len(values) >= MANY_MODULES else name, []).append(name)
    return {_pattern(names): values[names[0]] for names in groups.values()}


def _pattern(names: list[str]) -> str:
    escaped = [re.escape(name) for name in names]
    return f"^{escaped[0]}" if len(names) == 1 else f"^(?:{'|'.join(escaped)})"


def _excluded(user: Any, dropped: list[str]) -> Any:
    """The user's exclusions, a regular expression or a list of names, and the dropped modules.

    Always a regular expression once a module is dropped: in a list, PEFT takes a name for the end of a longer one.
    """
    if not dropped:
        return user
    patterns = [re.escape(name) for name in dropped]
    if isinstance(user, str):
        patterns.insert(0, f"(?:{user})")
    elif user:
        patterns.insert(0, rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(user)))})")
    return "|".join(patterns)


def make_resizable(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """Let the target modules load factors of any rank, and leave rank-0 factors out of what they save.

    Idempotent. After a load, call `finish_load` once training is about to start. Also keeps a quantised base fit for
    training (`guard_base`), so call it before the first evaluation.

    Raises:
        UnsupportedError: see `guard_base`.
    """
    guard_base(model)
    peft_model = unwrap(model)
    done = peft_model.__dict__.setdefault("_rankpilot_resizable", set())
    if targets[0].adapter in done:
        return
    done.add(targets[0].adapter)
    peft_model.register_load_state_dict_pre_hook(_LoadHook(peft_model, targets))
    for target in targets:
        target.layer.register_state_dict_post_hook(_SaveHook(target))


class _LoadHook:
    """Resizes every pair to what a state dict holds, before torch compares shapes.

    It sits on the whole model: a single layer sees only its own keys, and cannot tell a module that the file has at
    rank 0 from weights that have nothing to do with the adapter.
    """

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        paths = {module: path for path, module in model.named_modules()}
        self.prefixes = [(target, f"{paths[target.layer]}.") for target in targets]

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        found = []
        for target, path in self.prefixes:
            for name in target.parameters:
                _name_adapter(state, f"{prefix}{path}", name, target.adapter)
            keys = {f"{prefix}{path}{name}": value for name, value in target.parameters.items()}
            found.append((target, keys, state.get(next(iter(keys)))))
        if all(weight is None for _, _, weight in found):
            return  # some other weights are being loaded, not this adapter
        for target, keys, weight in found:
            rank = 0 if weight is None else int(weight.shape[0])
            if rank != target.rank:
                resize(target, rank)
            if weight is None:  # the dictionary is torch's own copy: a strict load then misses nothing
                state |= {key: value.detach() for key, value in keys.items()}
            # A Trainer that resumes makes its optimiser from what requires gradients now, and then expects all
            # the parameters that the first one had.
            for value in target.parameters.values():
                value.requires_grad_(True)


def _name_adapter(state: dict[str, torch.Tensor], path: str, name: str, adapter: str) -> None:
    """Rename an entry that lacks the adapter's name.

    PEFT adds the name only to keys that the model would save, so not where it is at rank 0.
    """
    plain = name.replace(f".{adapter}", "", 1)
    if f"{path}{plain}" in state:
        state[f"{path}{name}"] = state.pop(f"{path}{plain}")


class _SaveHook:
    """Leaves a pair at rank 0 out of the state dict: plain PEFT has no place for it."""

    def __init__(self, target: TargetModule) -> None:
        self.target = target

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        if self.target.rank == 0:
            for name in self.target.parameters:
                state.pop(f"{prefix}{name}", None)


def finish_load(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """After a load: rank-0 pairs stop requiring gradients, and the configuration tells the ranks."""
    for target in targets:
        for parameter in target.parameters.values():
            parameter.requires_grad_(target.rank > 0)
    sync_config(model, targets)


def adapter_ranks(targets: Sequence[TargetModule]) -> dict[str, int]:
    """Current rank by module name."""
    return {target.name: target.rank for target in targets}
