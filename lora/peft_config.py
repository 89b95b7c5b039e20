"""PEFT's view of adapters: fresh adapters, their scaling, and the ranks in a model's configuration.

PEFT builds an adapter from `adapter_config.json` before it reads the weights, so the configuration must hold each
module's rank and alpha (`sync_config`). An unchanged model refuses weights of another rank; after `make_resizable` it
loads them, as resuming and `load_best_model_at_end` need.

The scaling is the factor s in delta W = s B A. At a constant s a module learns faster at higher rank: under Adam each
of its r components takes steps of the same size. At a constant alpha, s = alpha / r, the best learning rate hardly
depends on the rank (docs/learning-rate.md). Rank changes therefore keep alpha, as in PEFT's `rank_pattern`: s is alpha
/ r, and alpha / sqrt(r) under `use_rslora` (Kalajdzievski, 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.arrays import IntArray
from ..common.errors import ConfigError, UnknownNameError, shown
from .resize import is_trained, resize
from .spec import MOST_REPEATS, REFERENCE_RANK, Scaling, absent, is_pattern, is_slow_pattern
from .targets import CONSTANT_SCALING, TargetModule, find_target_modules, guard_base, is_router, tied_pairs, unwrap

logger = logging.getLogger(__name__)


def fresh_adapters(
    base: PreTrainedModel,
    name: str,
    peft_type: str | None,
    *,
    new_head: bool,
    target_modules: str,
    target_parameters: str = "",
    **options: Any,
) -> PeftModel:
    """Return the model with fresh LoRA adapters.

    Args:
        base: the model.
        name: the model's name, for errors.
        peft_type: PEFT's `task_type`; None for none.
        new_head: whether the model's head is new, and trained fully.
        target_modules: "all-linear" or names separated by commas. If "all-linear" cannot cover all modules, a warning
            lists the exceptions.
        target_parameters: fused experts to adapt: "all-experts", names separated by commas, or none.
        options: further arguments of LoraConfig, such as r and lora_alpha.

    Raises:
        UnknownNameError: there is no such module or parameter.
        ConfigError: a module cannot carry an adapter.
    """
    modules = _all_linear(base) if target_modules == "all-linear" else _existing(base, target_modules)
    heads = _trained_heads(base, peft_type) if new_head else {}
    if target_parameters:
        heads["target_parameters"] = _experts_named(base, target_parameters)
    try:
        return get_peft_model(base, LoraConfig(target_modules=modules, task_type=peft_type, **heads, **options))
    except (ValueError, TypeError, AttributeError, NotImplementedError, re.error) as error:
        said = " ".join(re.sub(r"\(\n.*\n\)", "", str(error), flags=re.DOTALL).split())  # drop the module's repr
        raise ConfigError(f"Cannot adapt {name!r} with target_modules={shown(target_modules)}: {said}") from error


def _experts_named(base: nn.Module, target_parameters: str) -> list[str]:
    """Return the names of parameters that hold experts; PEFT compares them with the ends of full names."""
    experts = {id(parameter) for parameter in fused_experts(base)}
    paths = [path for path, parameter in base.named_parameters() if id(parameter) in experts]
    modules = [(path, getattr(module, "parametrizations", ())) for path, module in base.named_modules()]
    quantised = [f"{path}.{name}" for path, names in modules for name in names]  # PEFT compares their full names
    paths += quantised
    ends = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
    if not paths:
        kind = type(base).__name__
        raise ConfigError(f"target_parameters={target_parameters!r}: {kind} has no fused experts. Drop it.")
    if target_parameters == "all-experts":
        return quantised or ends
    names = [part.strip() for part in target_parameters.split(",")]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise UnknownNameError.of("target parameter", name, ends, "all-experts selects all fused experts.")
    return [path for path in quantised if path.endswith(tuple(f".{name}" for name in names))] or names


def fused_experts(module: nn.Module, *, recurse: bool = True) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module and its submodules that each hold the matrices of several experts."""
    for part in module.modules() if recurse else (module,):
        if type(part).__name__.endswith("Experts"):
            yield from (parameter for parameter in part.parameters(recurse=False) if parameter.dim() == 3)


def prepare_quantised(model: nn.Module) -> None:
    """Freeze a quantised model, and keep unquantised weights in fp32 as PEFT does, except fused experts.

    PEFT's `prepare_model_for_kbit_training` also casts those, which are most of a mixture's weights.
    """
    experts = {id(parameter) for parameter in fused_experts(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit"
        if half and id(parameter) not in experts:
            parameter.data = parameter.data.float()


def left_out(base: nn.Module) -> dict[str, str]:
    """Return modules that "all-linear" excludes with everything below them, and the reasons; usually empty.

    Args:
        base: the model, with or without adapters.
    """
    found: dict[str, str] = {}
    config, inside = getattr(base, "config", None), {id(module) for module in base.modules()}
    if isinstance(base, PreTrainedModel) and (hasattr(config, "vision_config") or hasattr(config, "audio_config")):
        text: nn.Module = base.get_decoder()
        heads = [base.get_submodule(name) for name in head_names(base)]
        inside = {id(module) for part in (text, *heads) for module in part.modules()}
    for name, module in base.named_modules():
        if is_router(name, module):
            found[name] = "routers"
        elif next(fused_experts(module, recurse=False), None) is not None or hasattr(module, "parametrizations"):
            found[name] = "fused experts"
        elif hasattr(module, "A_log") and hasattr(module, "D"):
            found |= dict.fromkeys((f"{name}.{each}" for each in _READ_PAST), "Mamba's layers except in_proj")
        elif name.endswith(".altup.correction_coefs"):  # in training, its clamped weight is read past an adapter
            found[name] = "AltUp's correction_coefs"
        elif isinstance(module, (nn.Linear, Conv1D)) and id(module) not in inside:
            found[name] = "modules that read no text"
    return found


_READ_PAST = ("x_proj", "dt_proj", "out_proj")
"""Mamba layers whose kernels read the weights directly, bypassing an adapter."""


def _all_linear(base: nn.Module) -> str | list[str]:
    """Resolve "all-linear": itself, or names if some layers support no adapter, which a warning lists."""
    reasons = left_out(base)
    if not reasons:
        return "all-linear"
    heads = head_names(base) if isinstance(base, PreTrainedModel) else []
    without = tuple(f"{name}." for name in (*reasons, *heads))
    linear = (name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    named = [name for name in linear if not f"{name}.".startswith(without)]
    config = LoraConfig(target_modules=named)
    with suppress(ImportError):  # from PEFT 0.19 on, some names always refer to experts
        conversion: Any = import_module("peft.utils.transformers_weight_conversion")
        conversion.convert_peft_config_for_transformers(config, base, None)
    kept = sorted(config.target_modules or ())
    taken = sorted({name.rpartition(".")[2] for name in {*named} - {*kept}})
    parts = list(dict.fromkeys(reasons.values()))
    parts += [f"{', '.join(taken)}, which PEFT treats as experts"] if taken else []
    logger.warning("target_modules='all-linear' excludes: %s.", "; ".join(parts))
    return kept


_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "projector")
"""Names of heads in models without a base model module of the name given by their class."""


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of modules outside the base model with weights, such as "classifier"."""
    with_weights = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if model.base_model_prefix in with_weights:
        return [name for name in with_weights if name != model.base_model_prefix]
    return [name for name in with_weights if name in _HEADS]


def _trained_heads(base: PreTrainedModel, peft_type: str | None) -> dict[str, Any]:
    """Return LoraConfig arguments to train new heads fully, without adapters in them."""
    heads = head_names(base)
    # PEFT does this itself for the usual names.
    if not heads or (peft_type == "SEQ_CLS" and set(heads) <= {"classifier", "score"}):
        return {}
    return {"modules_to_save": heads, "exclude_modules": rf"(?:{'|'.join(map(re.escape, heads))})(?:\..*)?"}


def _existing(base: PreTrainedModel, target_modules: str) -> str | list[str]:
    """Parse a comma-separated list of names, or a regular expression for full names, as PEFT accepts them.

    As in PEFT, missing names are ignored if at least one exists.

    Raises:
        UnknownNameError: none is a module that can be adapted.
        ConfigError: the expression cannot be read, or matches no such module.
    """
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    paths = [path for path, module in base.named_modules() if isinstance(module, kinds)]
    if is_pattern(target_modules):
        return _matching(base, paths, target_modules)
    names = [part.strip() for part in target_modules.split(",")]
    if len(missing := absent(names, paths)) == len(names):
        linear = [path for path in paths if not isinstance(base.get_submodule(path), nn.Embedding)]
        ends = dict.fromkeys(path.rpartition(".")[2] for path in linear)
        raise UnknownNameError.of("target module", missing[0], ends, "all-linear selects all linear layers.")
    return names


def _matching(base: PreTrainedModel, paths: Sequence[str], pattern: str) -> str:
    if is_slow_pattern(pattern):
        raise ConfigError(
            f"target_modules={shown(pattern)} may take very long to match. Do not repeat groups, repeat at "
            f"most {MOST_REPEATS} other parts, or write out the module names."
        )
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise ConfigError(f"target_modules={pattern!r} is not a valid regular expression: {error}.") from error
    if not found:
        raise ConfigError(
            f"target_modules={pattern!r} matches no linear layer or embedding of {type(base).__name__}. The "
            f"expression must match full names, such as {max(paths, key=len)!r}."
        )
    return pattern


def absent_targets(model: nn.Module) -> list[str]:
    """Return the target module names of a PEFT model's adapter that do not exist in the model."""
    peft_model = unwrap(model)
    names = getattr(peft_model.peft_config[peft_model.active_adapter], "target_modules", None)
    named = [] if names is None or isinstance(names, str) else sorted({*names} - {DUMMY_TARGET_MODULES})
    return absent(named, dict(peft_model.get_base_model().named_modules()))


def choose_scaling(targets: Sequence[TargetModule], scaling: Scaling) -> None:
    """Choose what future rank changes of these modules keep constant. It changes nothing now."""
    for target in targets:
        names: set[str] = target.layer.__dict__.setdefault(CONSTANT_SCALING, set())
        (names.add if scaling == "constant" else names.discard)(target.adapter)


@contextmanager
def reference_scaling(targets: Sequence[TargetModule]) -> Iterator[None]:
    """Use the scaling of `REFERENCE_RANK` for all modules inside the context; ranks must not change.

    Probes compare modules, so they need a common scaling.
    """
    before = [target.scaling for target in targets]
    for target in targets:
        target.layer.scaling[target.adapter] = target.scaling_at(REFERENCE_RANK)
    try:
        yield
    finally:
        for target, scaling in zip(targets, before, strict=True):
            target.layer.scaling[target.adapter] = scaling


_SETTINGS, _RESIZABLE = "_rankpilot_user_settings", "_rankpilot_resizable"


@dataclass(frozen=True)
class AsPassed:
    """An adapter as its user passed it to rankpilot.

    Attributes:
        ranks: the rank of each target module, by name.
        patterns: the user's `rank_pattern` and `alpha_pattern`; None if they do not lead to these ranks.
    """

    ranks: dict[str, int]
    patterns: tuple[dict[str, int], dict[str, int]] | None

    @classmethod
    def of(cls, targets: Sequence[TargetModule], config: LoraConfig) -> AsPassed:
        """Return the adapter of these modules, with its configuration."""

        def told(patterns: dict[str, int], name: str, default: int) -> int:
            return patterns.get(get_pattern_key(patterns, name), default)

        ranks, alphas = config.rank_pattern, config.alpha_pattern
        true = all(told(ranks, t.name, config.r) == t.rank for t in targets)
        true = true and all(told(alphas, t.name, config.lora_alpha) == t.alpha for t in targets)
        return cls(adapter_ranks(targets), (ranks, alphas) if true else None)


def ranks_as_passed(model: nn.Module, targets: Sequence[TargetModule]) -> IntArray:
    """Return the ranks that an adapter had when it became resizable, int64 (modules,); see `make_resizable`."""
    passed: AsPassed = unwrap(model).__dict__[_RESIZABLE][targets[0].adapter][1]
    return np.array([passed.ranks[target.name] for target in targets], dtype=np.int64)


"""Attributes of a PEFT model that hold, by adapter, its configuration with the user's settings, and module hooks."""

MANY_MODULES = 256
"""From this number on, modules of one rank share a pattern. PEFT tries every pattern on every module, and Python's `re`
caches 512 of them: with more, loading an adapter takes minutes.
"""


def sync_config(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """Write the current ranks into the model's LoraConfig, so that the adapter can be saved at any time.

    Adapted modules get anchored `rank_pattern` entries, and `alpha_pattern` entries unless all have `lora_alpha`;
    modules at rank 0 are listed in `exclude_modules`. The user's patterns are removed: PEFT sorts patterns on saving,
    and uses the first match.
    """
    peft_model = unwrap(model)
    adapter = targets[0].adapter
    config = _own_config(peft_model, adapter)
    settings = peft_model.__dict__.setdefault(_SETTINGS, {})
    if settings.get(adapter, (None,))[0] is not config:  # a later adapter of this name has settings of its own
        settings[adapter] = config, config.exclude_modules, config.target_modules, config.bias
    _, user_excluded, user_targets, bias = settings[adapter]
    adapted = [target for target in targets if target.rank > 0 or target.experts > 1]
    tied = tied_pairs(peft_model, targets)
    ranks = {t.name: max(t.rank, 1) for t in adapted} | {name: layer.r[adapter] for name, layer in tied.items()}
    resizable, passed, _ = peft_model.__dict__.get(_RESIZABLE, {}).get(adapter, (None, None, ()))
    as_passed = passed.patterns if resizable is config and passed.ranks == adapter_ranks(targets) else None
    alphas = {t.name: t.layer.lora_alpha[adapter] for t in adapted}
    alphas |= {name: layer.lora_alpha[adapter] for name, layer in tied.items()}
    exceptions = {} if set(alphas.values()) <= {config.lora_alpha} else alphas
    config.rank_pattern, config.alpha_pattern = as_passed or (_patterns(ranks), _patterns(exceptions))
    dropped = [target for target in targets if target.rank == 0 and target.experts == 1]
    # "lora_only" saves no bias of a module without a pair.
    config.bias = "all" if bias == "lora_only" and dropped else bias
    config.exclude_modules = _excluded(user_excluded, [target.name for target in dropped])
    # PEFT refuses to load an adapter whose target modules match no module, except under this dummy name.
    linear = tied or any(target.rank > 0 and target.experts == 1 for target in targets)
    none = DUMMY_TARGET_MODULES if dropped or not adapted else user_targets
    config.target_modules = user_targets if linear else none
    if config.init_lora_weights == "orthogonal":  # fails at odd ranks, and loading overwrites the weights anyway
        config.init_lora_weights = True


def config_for_others(model: PeftModel, adapter: str) -> LoraConfig:
    """Copy an adapter's configuration for a fresh fine-tune, including the biases its user trains."""
    config: LoraConfig = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = False
    config.bias = model.__dict__[_SETTINGS][adapter][3]
    return config


def _own_config(model: Any, adapter: str) -> Any:
    """Return the configuration of an adapter, made exclusive to it.

    PEFT copies none: users may create several models from one, and TRL's reference adapters share that of the trained
    adapter.
    """
    configs, own = model.peft_config, model.__dict__.setdefault("_rankpilot_configs", {})
    before = configs[adapter]
    shared = any(other is before for name, other in configs.items() if name != adapter)
    if shared or own.get(adapter) is not before:
        configs[adapter] = own[adapter] = copy.deepcopy(before)
        for kept in (model.__dict__.get(name, {}) for name in (_SETTINGS, _RESIZABLE)):
            if kept.get(adapter, (None,))[0] is before:
                kept[adapter] = configs[adapter], *kept[adapter][1:]
    return configs[adapter]


def _patterns(values: dict[str, Any]) -> dict[str, Any]:
    """Build PEFT's pattern dictionary for values by module name."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value if len(values) >= MANY_MODULES else name, []).append(name)
    escaped = [("|".join(map(re.escape, names)), names) for names in groups.values()]
    return {f"^{text}" if len(names) == 1 else f"^(?:{text})": values[names[0]] for text, names in escaped}


def _excluded(user: Any, dropped: list[str]) -> Any:
    """Merge the user's `exclude_modules` (a regular expression or names) and the dropped modules."""
    if not dropped:
        return user
    # The result is a regular expression, because PEFT would match a name in a list with the end of any longer name.
    patterns = [re.escape(name) for name in dropped]
    if isinstance(user, str):
        patterns.insert(0, f"(?:{user})")
    elif user:
        patterns.insert(0, rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(user)))})")
    return "|".join(patterns)


def make_resizable(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """Let the target modules load factors of any rank, and leave rank-0 factors out of saved adapters.

    Idempotent. After a load, call `finish_load` before training starts. This also calls `guard_base`, so call it before
    the first evaluation.

    Raises:
        UnsupportedError: see `guard_base`.
    """
    guard_base(model)
    peft_model = unwrap(model)
    done, adapter = peft_model.__dict__.setdefault(_RESIZABLE, {}), targets[0].adapter
    own = _own_config(peft_model, adapter)
    config, _, hooks = done.get(adapter, (None, None, ()))
    if config is own:
        return
    for hook in hooks:  # of an earlier adapter of this name
        hook.remove()
    hooks = [target.layer.register_state_dict_post_hook(partial(_omit_rank_0, target)) for target in targets]
    hooks.append(peft_model.register_load_state_dict_pre_hook(_LoadHook(peft_model, targets)))
    done[adapter] = own, AsPassed.of(targets, own), hooks


def resizable_targets(model: nn.Module, scaling: Scaling) -> list[TargetModule]:
    """Find the target modules, choose their scaling and let them load any ranks; call before loading a checkpoint."""
    targets = find_target_modules(model)
    choose_scaling(targets, scaling)
    make_resizable(model, targets)
    return targets


class _LoadHook:
    """Resizes every pair to its rank in a state dict, before torch compares shapes.

    The hook is on the whole model, because a single layer only sees its part of the state dict: it could not
    distinguish an adapter with this module at rank 0 from other weights.
    """

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        self.targets, paths = targets, {module: path for path, module in model.named_modules()}
        self.prefixes = [(target, f"{paths[target.layer]}.") for target in targets]

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        loads = []
        for target, path in self.prefixes:
            if not target.exists:
                return  # the adapter was deleted
            keys = {f"{prefix}{path}{name}": value for name, value in target.parameters.items()}
            for key, name in zip(keys, target.parameters, strict=True):
                # PEFT adds the adapter's name only to keys that the model saves, and modules at rank 0 are left out.
                plain = f"{prefix}{path}{name.replace(f'.{target.adapter}', '', 1)}"
                if plain in state:
                    state[key] = state.pop(plain)
            if f"{prefix}{path}bias" in state:  # see `_omit_rank_0`
                state[f"{prefix}{path}base_layer.bias"] = state.pop(f"{prefix}{path}bias")
            loads.append((target, keys, state.get(next(iter(keys)))))
        if all(weight_a is None for _, _, weight_a in loads):
            return  # the state dict holds other weights, not this adapter
        trains = any(value.requires_grad for target, _, _ in loads for value in target.parameters.values())
        for target, keys, weight_a in loads:
            rank = 0 if weight_a is None else int(weight_a.shape[0]) // target.experts
            if target.experts > 1 and weight_a is not None and not bool(weight_a.any()):
                rank, weight_a = 0, None  # see `_omit_rank_0`
                for key in keys:
                    state.pop(key, None)
            if rank != target.rank:
                resize(target, rank)
            if weight_a is None:  # a strict load needs all keys; torch passes a copy of the dictionary, so it may grow
                state |= {key: value.detach() for key, value in keys.items()}
        # A resuming Trainer creates its optimizer now, and expects all parameters of the original run.
        let_train([target for target, _, _ in loads], trains)
        sync_config(module, self.targets)


def _omit_rank_0(
    target: TargetModule, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Remove a rank-0 pair from the state dict, since plain PEFT cannot load it, and rename its bias accordingly.

    Experts get a zero pair of rank 1 instead: PEFT wraps both parameters of a layer, and excludes none.
    """
    if target.exists and target.rank == 0:
        for name in target.parameters:
            state.pop(f"{prefix}{name}", None)
        if f"{prefix}base_layer.bias" in state:
            state[f"{prefix}bias"] = state.pop(f"{prefix}base_layer.bias")
        if target.experts > 1:
            state |= {f"{prefix}{name}": zero for name, zero in zip(target.parameters, target.zeros(1), strict=True)}


def let_train(targets: Sequence[TargetModule], trains: bool = True) -> None:
    """Make all adapters require gradients, including those at rank 0 that may grow, for the next optimizer.

    Args:
        targets: modules of the adapters.
        trains: whether they require gradients; if not, none does.
    """
    for target in targets:
        for parameter in target.parameters.values():
            parameter.requires_grad_(trains)


def finish_load(model: nn.Module, targets: Sequence[TargetModule]) -> None:
    """After a load: freeze rank-0 pairs, and write the ranks into the configuration."""
    for target in (target for target in targets if target.rank == 0):
        for parameter in target.parameters.values():
            parameter.requires_grad_(False)
    sync_config(model, targets)


def adapter_ranks(targets: Sequence[TargetModule]) -> dict[str, int]:
    """Return the current rank of each target module, by module name."""
    return {target.name: target.rank for target in targets}


@contextmanager
def start_kept(
    model: torch.nn.Module, targets: Sequence[TargetModule], fresh: bool, note: Callable[[str], None]
) -> Iterator[None]:
    """Keep the initial directions of untrained adapters through rank changes inside the context.

    A module keeps as many rows of A as its new rank allows (for EVA, arXiv 2410.07170, the most important ones), and
    random ones beyond; the function stays. A run planned at the ranks of its LoraConfig thus starts as it would without
    rankpilot. The first plan overrides a `rank_pattern` and initialisations with two nonzero factors, and reports it.

    Args:
        model: holds the adapters.
        targets: the target modules.
        fresh: keep nothing, since adapters start anew.
        note: called with each line to report.
    """
    peft_model, adapter = unwrap(model), targets[0].adapter
    config, synced = peft_model.peft_config[adapter], peft_model.__dict__.get(_SETTINGS, {})
    start, of_user = config.init_lora_weights, synced.get(adapter, (None,))[0] is not config
    begins = fresh or not any(map(is_trained, targets))
    if begins and config.rank_pattern and of_user:
        instead = "Use `bounds` to fix the rank of a module."
        note(f"LoraConfig's rank_pattern is ignored, since the policy decides all ranks. {instead}")
    both = any(bool((target.weight_a if target.embedding else target.weight_b).any()) for target in targets)
    if not begins or fresh or both:
        yield
        if begins and start is not True:
            note(f"This run starts with PEFT's default initialization instead of init_lora_weights={start!r}.")
        return
    before = [_drawn(target).to("cpu", copy=True) for target in targets]
    yield
    with torch.no_grad():
        for target, rows in zip(targets, before, strict=True):
            count = min(target.rank, rows.shape[1])
            _drawn(target)[:, :count] = rows[:, :count]


def _drawn(target: TargetModule) -> torch.Tensor:
    """Return the randomly initialised factor, (experts, rank, width); the other one is zero."""
    return target.weight_b.detach().mT[None] if target.embedding else target.each_a(target.weight_a.detach())
