"""Target modules: what carries one LoRA pair, in the order in which the model lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import ConfigError, UnknownNameError, UnsupportedError


@dataclass(frozen=True, eq=False)
class TargetModule:
    """One LoRA pair: delta W = scaling * B A.

    Attributes:
        name: full name inside the base model, as in `LoraConfig.rank_pattern`.
        adapter: name of the PEFT adapter.
        block: index of the layer that the module belongs to, 0 at the bottom.
        d_in: input width; A has shape (rank, d_in).
        d_out: output width; B has shape (d_out, rank).
        layer: the PEFT layer.
    """

    name: str
    adapter: str
    block: int
    d_in: int
    d_out: int
    layer: LoraLayer = field(repr=False)

    @property
    def weight_a(self) -> nn.Parameter:
        """A, shape (rank, d_in)."""
        weight: nn.Parameter = self.layer.lora_A[self.adapter].weight
        return weight

    @property
    def weight_b(self) -> nn.Parameter:
        """B, shape (d_out, rank)."""
        weight: nn.Parameter = self.layer.lora_B[self.adapter].weight
        return weight

    @property
    def rank(self) -> int:
        """Current rank; 0 means that the module is not adapted."""
        return int(self.weight_a.shape[0])

    @property
    def max_rank(self) -> int:
        """The largest rank that can add anything: min(d_in, d_out)."""
        return min(self.d_in, self.d_out)

    @property
    def scaling(self) -> float:
        """The factor in front of B A; rank changes leave it alone."""
        return float(self.layer.scaling[self.adapter])


def _layer_key(name: str) -> str:
    """The part of a module's name that names its layer: up to the first number, else its parent."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match.group(1) if match else name.rpartition(".")[0]


def _refuse(name: str, layer: LoraLayer, adapter: str) -> None:
    """Raise UnsupportedError if the pair is not a plain low-rank pair on a linear layer."""
    reason = None
    if adapter not in layer.lora_A:
        reason = "only adapters on linear layers can change rank, not embeddings"
    elif layer.lora_variant.get(adapter) is not None:
        reason = f"the LoRA variant {type(layer.lora_variant[adapter]).__name__} cannot change rank yet"
    elif not isinstance(layer.lora_A[adapter], nn.Linear):
        reason = f"its factors are {type(layer.lora_A[adapter]).__name__}, not Linear"
    elif type(layer.lora_A[adapter].weight.data) is not torch.Tensor:
        reason = "its factors are sharded (DTensor or FSDP)"
    if reason:
        raise UnsupportedError(
            f"Target module {name!r}: {reason}. Use plain LoRA or rsLoRA on linear layers, or leave the module "
            "out of `target_modules`."
        )


def find_target_modules(model: nn.Module, adapter: str | None = None) -> list[TargetModule]:
    """All LoRA pairs of one adapter.

    Args:
        model: a PeftModel, possibly wrapped.
        adapter: which adapter; the active one by default.

    Raises:
        UnsupportedError: the model is no LoRA model, or carries pairs whose rank cannot be changed.
        UnknownNameError: there is no adapter of that name.
    """
    peft_model = unwrap(model)
    name = adapter or peft_model.active_adapter
    if name not in peft_model.peft_config:
        raise UnknownNameError.of("adapter", str(name), peft_model.peft_config)
    base = peft_model.get_base_model()
    layers = [(path, module) for path, module in base.named_modules() if isinstance(module, LoraLayer)]
    blocks: dict[str, int] = {}
    targets = []
    for path, layer in layers:
        if name not in layer.r:
            continue
        _refuse(path, layer, name)
        weight_a, weight_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        block = blocks.setdefault(_layer_key(path), len(blocks))
        targets.append(TargetModule(path, name, block, weight_a.shape[1], weight_b.shape[0], layer))
    if not targets:
        raise UnsupportedError(f"Adapter {name!r} of {type(base).__name__} has no LoRA target module.")
    return targets


def unwrap(model: nn.Module) -> PeftModel:
    """The PeftModel inside wrappers such as DistributedDataParallel or torch.compile's.

    Raises:
        UnsupportedError: there is none.
    """
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, PeftModel):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if inner is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not a PEFT model. Wrap it first: "
            "`peft.get_peft_model(model, LoraConfig(r=8, target_modules='all-linear'))`."
        )
    return inner


def check_ranks(targets: Sequence[TargetModule], ranks: dict[str, int]) -> None:
    """Check a plan by names: known modules, ranks from 0 to min(d_in, d_out).

    Raises:
        UnknownNameError: a module that does not exist.
        ConfigError: a rank that is negative or larger than the module allows.
    """
    by_name = {target.name: target for target in targets}
    for name, rank in ranks.items():
        if name not in by_name:
            raise UnknownNameError.of("target module", name, by_name)
        if not 0 <= rank <= by_name[name].max_rank:
            raise ConfigError(f"Rank {rank} of {name!r} is not between 0 and {by_name[name].max_rank}.")


def other_trainable(model: nn.Module, targets: Iterable[TargetModule]) -> list[nn.Parameter]:
    """Trainable parameters that are no LoRA pair of `targets`, such as a classifier in `modules_to_save`."""
    pairs = {id(weight) for target in targets for weight in (target.weight_a, target.weight_b)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in pairs]
