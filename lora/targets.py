"""Target modules of a model, the modules with a LoRA pair, and the frozen weights below their adapters.

Target modules are checked: their ranks must be changeable. The frozen model may be quantised (bitsandbytes, torchao,
optimum-quanto). Its parameters then hold codes or packed bytes, which must be dequantised before use.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import Embedding, LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn
from torch.distributed.tensor import DTensor

from ..common.errors import ConfigError, UnknownNameError, UnsupportedError
from .spec import ModuleSpec


def guard_base(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU; call before the first evaluation. Idempotent.

    On CPUs with AVX512-BF16, the first forward pass in evaluation mode repacks each `Linear4bit` for fast inference
    (bitsandbytes 0.50, `Linear4bit.forward`). A repacked layer has no backward pass: adapters below it silently get no
    gradient. Any `state_dict()` unpacks it, but with block scales rounded to bfloat16 and, without double quantisation,
    transposed: other weights. The guard makes evaluation on such a CPU slower, but consistent with training. Other
    layers do not change.

    Raises:
        UnsupportedError: a layer has been repacked already, so its weights differ from the loaded ones.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        # Repacking sets this attribute, and unpacking leaves it (as False).
        if hasattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu"):
            raise UnsupportedError(
                f"The 4-bit weights of {name!r} were repacked for inference by an evaluation on this CPU, and "
                "training through them is no longer possible. Reload the model and call "
                "`rankpilot.lora.targets.guard_base(model)` before any evaluation."
            )
        if module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False


def scale_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield bitsandbytes' tensors for a quantised layer outside parameters and buffers."""
    weight = getattr(module, "weight", None)
    if get_bnb_param_type(weight):
        yield from _held(module)
        yield from _held(weight)
    elif hasattr(module, "quant_state"):  # the parametrisation of a parameter other than a layer's weight
        yield from _held(module)


def _held(holder: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an object's attributes, and in quantisation states among them."""
    for value in vars(holder).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value).__name__ in ("QuantState", "MatmulLtState"):
            yield from _held(value)


def base_norm(layer: LoraLayer) -> float:
    """Return the Frobenius norm of a layer's frozen weight; takes layers and raises errors as `real_weight`."""
    weight = real_weight(layer)
    # Squares of half-precision values would overflow or vanish, so they are summed in single precision.
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


@torch.no_grad()
def real_weight(layer: LoraLayer) -> torch.Tensor:
    """Return the frozen weight of a linear layer (quantised or not), a Conv1D or an embedding.

    Returns:
        The weight in the base layer's orientation, in a floating-point dtype of at least 16 bits. A plain weight is
            returned itself, not copied.

    Raises:
        UnsupportedError: the weight is stored in an unknown form.
    """
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        stack: torch.Tensor = layer.get_param().detach()
        return stack
    weight: Any = getattr(base, "weight", None)
    kind = get_bnb_param_type(weight)
    if kind == "4bit" or (kind == "8bit" and not weight.is_floating_point()):  # 16 bits with `has_fp16_weights`
        # On the CPU, dequantize_module_weight would replace the layer's parameter, so its inner function is called.
        weight = dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    elif weight is not None:
        weight = dequantize_module_weight(base).detach()
        if isinstance(weight, DTensor):  # sharded over processes, and gathered here
            weight = weight.full_tensor()
        elif type(weight) is not torch.Tensor:  # PEFT does not dequantise quanto's tensors
            weight = weight.dequantize()
    if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        stored = "no weight" if weight is None else f"a weight of {weight.dtype}, whose actual values cannot be read"
        raise UnsupportedError(
            f"{type(base).__name__} has {stored}. Supported: plain weights, and weights quantised by "
            "bitsandbytes, torchao or optimum-quanto."
        )
    result: torch.Tensor = weight
    return result


CONSTANT_SCALING = "_rankpilot_constant_scaling"
"""Attribute of a PEFT layer: its adapters with a constant scaling under rank changes; see `lora/peft_config.py`."""

CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of `init_lora_weights` that subtract the first adapter from the frozen weights."""


@dataclass(frozen=True, eq=False)
class TargetModule(ModuleSpec):
    """A module of a PEFT model with its LoRA pair.

    Attributes:
        adapter: name of the PEFT adapter.
        layer: the PEFT layer.
        embedding: whether the module is a token embedding, whose pair starts with A = 0 and a random B.
    """

    adapter: str
    layer: LoraLayer = field(repr=False)
    embedding: bool = False

    def __eq__(self, other: object) -> bool:
        """Compare by identity: pairs of two models differ, even with equal names and widths."""
        return self is other

    def __hash__(self) -> int:
        return object.__hash__(self)

    @property
    def exists(self) -> bool:
        """True if the adapter still exists: PEFT can delete it."""
        return self.adapter in (self.layer.lora_embedding_A if self.embedding else self.layer.lora_A)

    @property
    def weight_a(self) -> nn.Parameter:
        """A, shape (rank, d_in); for experts (experts x rank, width), the expert axis slowest."""
        return self._weight(self.layer.lora_embedding_A if self.embedding else self.layer.lora_A)

    @property
    def weight_b(self) -> nn.Parameter:
        """B, shape (d_out, rank); for experts (width, rank x experts), the expert axis fastest."""
        return self._weight(self.layer.lora_embedding_B if self.embedding else self.layer.lora_B)

    def _weight(self, factors: Any) -> nn.Parameter:
        factor = factors[self.adapter]
        weight: nn.Parameter = factor if self.embedding else factor.weight
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of B (`lora_bias`), shape (d_out,)."""
        bias: nn.Parameter | None = None if self.embedding else self.layer.lora_B[self.adapter].bias
        return bias

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's magnitude, shape (d_out,)."""
        vectors = self.layer.lora_magnitude_vector
        weight: nn.Parameter | None = vectors[self.adapter].weight if self.adapter in vectors else None
        return weight

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name inside the layer: A, B, then bias and magnitude if present."""
        key = "lora_embedding_{}.{}" if self.embedding else "lora_{}.{}.weight"
        named = {key.format("A", self.adapter): self.weight_a, key.format("B", self.adapter): self.weight_b}
        if self.bias is not None:
            named[f"lora_B.{self.adapter}.bias"] = self.bias
        if self.magnitude is not None:
            named[f"lora_magnitude_vector.{self.adapter}.weight"] = self.magnitude
        return named

    @property
    def rank(self) -> int:
        """Current rank; 0 means the module is not adapted."""
        return int(self.weight_a.shape[0]) // self.experts

    def zeros(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of another rank, all zero."""
        count, a, b = self.experts, self.weight_a, self.weight_b
        return a.new_zeros(count * rank, self.d_in // count), b.new_zeros(self.d_out // count, rank * count)

    def each_a(self, like_a: torch.Tensor) -> torch.Tensor:
        """View a tensor of A's shape as one matrix per expert, (experts, rank, width)."""
        return like_a.reshape(self.experts, like_a.shape[0] // self.experts, like_a.shape[1])

    def each_b(self, like_b: torch.Tensor) -> torch.Tensor:
        """View a tensor of B's shape as one matrix per expert, (experts, width, rank)."""
        rank = like_b.shape[1] // self.experts
        return like_b.reshape(like_b.shape[0], rank, self.experts).permute(2, 0, 1)

    @staticmethod
    def joined(each_a: torch.Tensor, each_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B from one matrix per expert; see `each_a` and `each_b`."""
        return each_a.flatten(0, 1), each_b.permute(1, 2, 0).flatten(1)

    @property
    def scaling(self) -> float:
        """The current factor on B A."""
        return float(self.layer.scaling[self.adapter])

    @property
    def alpha(self) -> float:
        """PEFT's `lora_alpha` of this module, by default kept when its rank changes."""
        alpha: float = self.layer.lora_alpha[self.adapter]
        return alpha

    def alpha_at(self, rank: int) -> float:
        """Return `alpha` after a change to this rank."""
        return self.scaling * self._root(rank) if self._constant_scaling else self.alpha

    def scaling_at(self, rank: int) -> float:
        """Return `scaling` after a change to this rank: alpha / rank, unless it is constant; rank 0 counts as 1."""
        return self.scaling if self._constant_scaling else self.alpha / self._root(rank)

    @property
    def _constant_scaling(self) -> bool:
        return self.adapter in self.layer.__dict__.get(CONSTANT_SCALING, ())

    def _root(self, rank: int) -> float:
        """Return PEFT's divisor of alpha."""
        return math.sqrt(max(rank, 1)) if self.layer.use_rslora.get(self.adapter) else max(rank, 1)


def _layer_key(name: str) -> str:
    """Return the name of the layer with a module: up to the first number, or the parent if there is none."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match.group(1) if match else name.rpartition(".")[0]


def is_router(name: str, module: nn.Module) -> bool:
    """True if a module routes tokens to experts; `name` is its path inside the model."""
    return "Router" in type(module).__name__ or ".router." in f".{name}."


def _refuse(name: str, layer: LoraLayer, adapter: str) -> None:
    variant = layer.lora_variant.get(adapter)
    reason = None
    if is_router(name, layer.get_base_layer()):
        reason = "it is a router, and an adapter would change which experts a token gets"
    elif isinstance(layer, (MultiheadAttention, LoraParallelLinear)):
        reason = f"adapters of PEFT's layer type {type(layer).__name__} cannot change rank"
    elif variant is not None and not isinstance(variant, (DoraLinearVariant, DoraEmbeddingVariant)):
        reason = f"the LoRA variant {type(variant).__name__} cannot change rank"
    elif not isinstance(layer, Embedding) and not isinstance(layer.lora_A[adapter], nn.Linear):
        reason = f"its factors are {type(layer.lora_A[adapter]).__name__}, not Linear"
    if reason:
        raise UnsupportedError(
            f"Target module {name!r}: {reason}. Use LoRA, rsLoRA or DoRA on linear layers and token "
            "embeddings, or remove the module from `target_modules`."
        )


def _refuse_config(config: LoraConfig) -> None:
    """Raise UnsupportedError for settings that keep an adapter of changed ranks from being loaded."""
    if str(config.init_lora_weights).lower().startswith(CHANGES_THE_BASE):
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} changes the frozen weights by an amount that "
            "PEFT computes from the rank each time it loads the adapter, so an adapter with new ranks would "
            "load incorrectly. Use the default, or 'eva'. To use this initialization, plan the ranks with "
            "`allocate` under the default one, set init_lora_weights in the LoraConfig it returns, and train "
            "without rankpilot."
        )


PLAN_FIRST = (
    "Or plan first and train anywhere: `rankpilot plan MODEL DATA --budget 70% --output plan.json`, "
    "then LoraConfig(**json.load(open('plan.json'))), without rankpilot (docs/train-anywhere.md)."
)


def _refuse_unsloth(base: nn.Module) -> None:
    for module in base.modules():
        forward = vars(module).get("forward", type(module).forward)
        if str(getattr(forward, "__module__", "")).startswith("unsloth"):
            raise UnsupportedError(
                f"Unsloth runs {type(module).__name__} with its own kernels, which fuse adapters and layers, so "
                f"the memory of a step is unknown. Load the model with transformers. {PLAN_FIRST}"
            )


def _refuse_shards(targets: Sequence[TargetModule]) -> None:
    for target in targets:
        for weight in (target.weight_a, target.weight_b):
            if type(weight.data) is not torch.Tensor:
                raise UnsupportedError(
                    f"Target module {target.name!r}: its factors are sharded ({type(weight.data).__name__}), so their "
                    f"rank cannot change. Keep the adapters unsharded (fully_shard with ignored_params). {PLAN_FIRST}"
                )


def _without_tied(targets: Sequence[TargetModule]) -> list[TargetModule]:
    """Return the target modules with an exclusive pair: a shared pair keeps the rank of its LoraConfig."""
    addresses = [[weight.data_ptr() for weight in (target.weight_a, target.weight_b)] for target in targets]
    count = Counter(chain.from_iterable(addresses))  # 0 if a tensor is empty or on the meta device
    return [t for t, each in zip(targets, addresses, strict=True) if all(not a or count[a] == 1 for a in each)]


def find_target_modules(model: nn.Module) -> list[TargetModule]:
    """Return all target modules of the active adapter, in model order.

    Modules that share one pair (`ensure_weight_tying`) are excluded.

    Args:
        model: a PeftModel, possibly wrapped.

    Raises:
        UnsupportedError: the model has no LoRA pair, or one whose rank cannot change.
        UnknownNameError: the active adapter was deleted.
    """
    peft_model = unwrap(model)
    name = peft_model.active_adapter
    if name not in peft_model.peft_config:
        raise UnknownNameError.of("adapter", str(name), peft_model.peft_config)
    config = peft_model.peft_config[name]
    if isinstance(config, LoraConfig):
        _refuse_config(config)
    base = peft_model.get_base_model()
    _refuse_unsloth(base)
    blocks: dict[str, int] = {}
    targets = []
    for path, layer in base.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.r:
            continue
        _refuse(path, layer, name)
        experts, embedding = 1, isinstance(layer, Embedding)
        if isinstance(layer, ParamWrapper):
            path, experts = f"{path.replace('.base_layer', '')}.{layer.parameter_name}", layer.num_experts
        if embedding:
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        block, widths = blocks.setdefault(_layer_key(path), len(blocks)), (experts * a.shape[1], experts * b.shape[0])
        targets.append(TargetModule(path, block, *widths, name, layer, embedding, experts=experts))
    _refuse_shards(targets)
    targets = _without_tied(targets)
    if not targets:
        kind = "" if isinstance(config, LoraConfig) else f": it is {config.peft_type.value}. Adapt it with LoraConfig"
        raise UnsupportedError(f"Adapter {name!r} of {type(base).__name__} has no LoRA target module{kind}.")
    return targets


def tied_pairs(model: PeftModel, targets: Sequence[TargetModule]) -> dict[str, LoraLayer]:
    """Return layers by name with a pair of the same adapter outside its target modules: see `_without_tied`."""
    known, adapter = {id(target.layer) for target in targets}, targets[0].adapter
    layers = (item for item in model.get_base_model().named_modules() if isinstance(item[1], LoraLayer))
    return {name: layer for name, layer in layers if adapter in layer.r and id(layer) not in known}


def unwrap(model: nn.Module) -> PeftModel:
    """Return the PeftModel inside wrappers such as those of DistributedDataParallel and torch.compile.

    Raises:
        UnsupportedError: the model holds no PeftModel.
    """
    inner = wrappers_of(model)[-1]
    if isinstance(inner, PeftMixedModel):
        raise UnsupportedError("PeftMixedModel mixes kinds of adapters. Call `get_peft_model` without mixed=True.")
    if not isinstance(inner, PeftModel):
        raise UnsupportedError(
            f"{type(model).__name__} is not a PEFT model. Wrap it first: "
            "`peft.get_peft_model(model, LoraConfig(r=8, target_modules='all-linear'))`."
        )
    return inner


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """Return a model and everything it successively wraps, up to the first PeftModel."""
    found = [model]
    while not isinstance(found[-1], PeftModel):
        inner = getattr(found[-1], "_orig_mod", None) or getattr(found[-1], "module", None)
        if not isinstance(inner, nn.Module):
            break
        found.append(inner)
    return found


def check_ranks(targets: Sequence[TargetModule], ranks: Mapping[str, int]) -> None:
    """Check that these modules exist and can have these ranks (by module name).

    Raises:
        UnknownNameError: there is no such target module.
        ConfigError: a rank is negative.
        UnsupportedError: an adapter is merged into the frozen weights.
    """
    names = dict.fromkeys(target.name for target in targets)  # in the model's order, for the error
    for name, rank in ranks.items():
        if name not in names:
            raise UnknownNameError.of("target module", name, names)
        if rank < 0:
            raise ConfigError(f"Rank {rank} of {name!r} is negative. The lowest rank is 0, which removes the adapter.")
    check_unmerged(targets)


def check_unmerged(targets: Iterable[TargetModule]) -> None:
    """Raise UnsupportedError if an adapter is merged into the frozen weights."""
    merged = next((target.name for target in targets if target.layer.merged), None)
    if merged:
        raise UnsupportedError(
            f"The adapter of {merged!r} is merged into the frozen weight, so its rank cannot change. Call "
            "`unmerge_adapter()` first."
        )


def check_trains(targets: Iterable[TargetModule]) -> None:
    """Raise UnsupportedError if a pair of rank 1 or more is frozen (requires_grad is False) or disabled."""
    for target in targets:
        if target.layer.disable_adapters:
            raise UnsupportedError(
                f"The adapter of {target.name!r} is disabled, so it would not be trained. Call "
                "`model.base_model.enable_adapter_layers()` first, or leave the `disable_adapter()` block."
            )
        if target.rank > 0 and not (target.weight_a.requires_grad and target.weight_b.requires_grad):
            raise UnsupportedError(
                f"The adapter of {target.name!r} is frozen (requires_grad is False), so its rank cannot be "
                "decided. To continue training a loaded adapter, pass `is_trainable=True`. Remove modules that "
                "should not be trained from `target_modules`; use `bounds` to fix the rank of one that should."
            )


def other_trainable(model: nn.Module, targets: Iterable[TargetModule]) -> list[nn.Parameter]:
    """Return trainable parameters other than A and B of `targets`, such as a classifier in `modules_to_save`."""
    pairs = {id(weight) for target in targets for weight in (target.weight_a, target.weight_b)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in pairs]
