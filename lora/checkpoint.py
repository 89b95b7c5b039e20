"""Adapter files that plain PEFT loads, and models that load adapters of any ranks back.

PEFT builds an adapter from `adapter_config.json` before it reads the weights, so the configuration must tell each
module's rank and alpha. A stock model refuses weights of another rank; `make_resizable` lets it take them, which
is what resuming and `load_best_model_at_end` need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .ranks import bookkeep, write_in_place
from .targets import TargetModule, unwrap


def sync_config(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """Write the current ranks into the model's LoraConfig, so that any save from now on is right.

    Each adapted module gets an anchored `rank_pattern` and `alpha_pattern` entry; modules at rank 0 are listed in
    `exclude_modules`. Entries that the user had set for other modules stay.
    """
    peft_model = unwrap(model)
    config = peft_model.peft_config[targets[0].adapter]
    keys = {target: "^" + re.escape(target.name) for target in targets}
    ours = set(keys.values())
    config.rank_pattern = {k: v for k, v in config.rank_pattern.items() if k not in ours}
    config.alpha_pattern = {k: v for k, v in config.alpha_pattern.items() if k not in ours}
    live = [target for target in targets if target.rank > 0]
    # The first matching pattern wins, so ours come first.
    config.rank_pattern = {keys[t]: t.rank for t in live} | config.rank_pattern
    config.alpha_pattern = {keys[t]: t.layer.lora_alpha[t.adapter] for t in live} | config.alpha_pattern
    # What the user excluded, as it was before our first change.
    original = peft_model.__dict__.setdefault("_rankpilot_user_exclude", {})
    user = original.setdefault(targets[0].adapter, config.exclude_modules)
    config.exclude_modules = _excluded(user, [target.name for target in targets if target.rank == 0])


def _excluded(user: Any, dropped: list[str]) -> Any:
    """The user's exclusions, a regular expression or a list of names, and the dropped modules."""
    if not isinstance(user, str):
        return [*(user or ()), *dropped] or None
    return "|".join([f"(?:{user})", *map(re.escape, dropped)])


def make_resizable(targets: Sequence[TargetModule]) -> None:
    """Let each target module load factors of any rank, and leave rank-0 factors out of what it saves.

    Idempotent. After a load, call `settle` once training is about to start.
    """
    for target in targets:
        if getattr(target.layer, "_rankpilot_resizable", None) == target.adapter:
            continue
        target.layer._rankpilot_resizable = target.adapter
        target.layer.register_load_state_dict_pre_hook(_LoadHook(target))
        target.layer.register_state_dict_post_hook(_SaveHook(target))


class _LoadHook:
    """Resizes the pair to what a state dict holds, before torch compares shapes."""

    def __init__(self, target: TargetModule) -> None:
        self.target = target

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        target = self.target
        mark = f".lora_A.{target.adapter}.weight"
        weight = state.get(f"{prefix}lora_A.{target.adapter}.weight")
        if weight is None and not any(key.endswith(mark) for key in state):
            return  # some other weights are being loaded, not this adapter
        rank = 0 if weight is None else int(weight.shape[0])
        if rank != target.rank:
            write_in_place(target.weight_a, target.weight_a.new_zeros(rank, target.d_in))
            write_in_place(target.weight_b, target.weight_b.new_zeros(target.d_out, rank))
            bookkeep(target, rank)
        # A Trainer that resumes makes its optimiser from what requires gradients now, and then expects all the
        # parameters that the first one had.
        for factor in (target.weight_a, target.weight_b):
            factor.requires_grad_(True)


class _SaveHook:
    """Leaves a pair at rank 0 out of the state dict: plain PEFT has no place for it."""

    def __init__(self, target: TargetModule) -> None:
        self.target = target

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        if self.target.rank == 0:
            for factor in ("lora_A", "lora_B"):
                state.pop(f"{prefix}{factor}.{self.target.adapter}.weight", None)


def settle(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """After a load: rank-0 pairs stop requiring gradients, and the configuration tells the ranks."""
    for target in targets:
        for factor in (target.weight_a, target.weight_b):
            factor.requires_grad_(target.rank > 0)
    sync_config(model, targets)


def adapter_ranks(targets: Sequence[TargetModule]) -> dict[str, int]:
    """Current rank by module name."""
    return {target.name: target.rank for target in targets}

