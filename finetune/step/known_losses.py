"""Losses known to be a sum over rows or tokens, so that a step may run in parts by default.

No test of some rows proves that rows never interact in a loss: a class with its own weight may be in none of them. So a
loss is recognized by its code: that of transformers or TRL, unmodified.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _global_backward_hooks, _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedModel, Trainer
from transformers.loss import loss_utils
from transformers.models.auto import modeling_auto as auto
from transformers.trainer_pt_utils import LabelSmoother

from ...cost.savers.later_logits import tiled_causal_lm_loss
from ...lora.resize import held_nodes
from ...lora.targets import unwrap

_STEP = ("training_step", "get_batch_samples", "_prepare_context_parallel_inputs", "_prepare_inputs")
_LOSS = ("compute_loss", "_compute_loss", "compute_loss_context_manager", "compute_ref_log_probs")
_ANSWERS = ("_get_per_token_logps_and_entropies", "get_off_policy_mask", "get_gamma_weights")
STEP = (*_STEP, *_LOSS, *_ANSWERS)
"""Methods of a Trainer that compute the loss of a step."""

_TRAINERS = (
    "transformers.trainer",
    "transformers.trainer_seq2seq",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.rloo_trainer",
)
"""Modules with known trainers."""

_SUMS = (
    tiled_causal_lm_loss,
    loss_utils.ForCausalLMLoss,
    loss_utils.ForMaskedLMLoss,
    loss_utils.ForSequenceClassificationLoss,
    loss_utils.ForTokenClassification,
)

_HEADS = [
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
]


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


_MASKED = _set(
    "albert bart bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie m2m_100 marian mbart "
    "modernbert mpnet mt5 pegasus roberta t5 umt5 xlm-roberta xlm-roberta-xl"
)
"""Families that attend to tokens on both sides, but to no masked ones. A causal model attends to none on the right."""

_MEET = _set("big_bird bigbird_pegasus nllb-moe reformer switch_transformers xlnet")
"""Families whose rows interact, or whose results depend on the length of the batch."""

_LENGTHS_CHANGE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest row."""

_LEFT = _set(
    "cohere cohere2 gemma gemma2 gemma3_text glm glm4 gpt_neox granite llama mistral olmo olmo2 olmo3 phi phi3 "
    "qwen2 qwen3 smollm3 stablelm starcoder2"
)
"""Families that use relative positions only: padding on the left changes nothing."""

_PAIRS = _set("sigmoid hinge ipo exo_pair nca_pair robust sppo_hard apo_zero apo_down discopop sigmoid_norm")
"""DPO losses that are a mean over pairs."""

_OURS = _set("accelerate auto_gptq awq bitsandbytes gptqmodel optimum peft rankpilot torch torchao transformers trl")
"""Packages whose modules and hooks compute each row independently."""


def unknown_trainer(trainer: Trainer, methods: Iterable[str], replaced: Mapping[str, Any]) -> str:
    """Return why a Trainer's loss is not known to be a sum over rows or tokens, for people; empty if it is.

    Args:
        trainer: the Trainer.
        methods: names of its methods that compute the loss.
        replaced: the Trainer's attributes replaced by rankpilot's functions, by name.
    """
    attributes = {**vars(trainer), **replaced}
    for name in methods:
        own = attributes.get(name) or getattr(type(trainer), name, None)
        if own is not None and _written_in(own) not in _TRAINERS:
            return f"{name} of {type(trainer).__name__} is not from transformers or TRL"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is custom"
    if type(trainer.label_smoother) not in (type(None), LabelSmoother) or not _is_of(LabelSmoother.__call__):
        return f"{type(trainer.label_smoother).__name__} is not a label smoother of transformers"
    backward = vars(trainer.accelerator).get("backward") or type(trainer.accelerator).backward
    if _package(_written_in(backward)) != "accelerate":
        return "accelerator.backward is custom"
    if trainer.neftune_noise_alpha is not None:
        return "NEFTune's noise depends on the padding"
    if getattr(trainer, "aux_loss_enabled", False):
        return "rows affect each other in the experts' balance loss"
    if odd := set(getattr(trainer, "loss_types", ())) - _PAIRS:
        return f"rows affect each other in the loss {min(odd)}"
    return ""


def unknown_model(model: nn.Module, longest: Callable[[], int]) -> str:
    """Return why a model's loss is not known to be a sum over rows or tokens, for people; empty if it is.

    Args:
        model: the PEFT model.
        longest: returns the tokens of the longest row.
    """
    base: Any = unwrap(model).get_base_model()
    kind = type(base).__name__
    if not isinstance(base, PreTrainedModel) or kind not in _names(_HEADS) or base.loss_function not in _SUMS:
        return f"the loss of {kind} is not known to rankpilot"
    if changed := next((each for each in _functions(base) if not _is_of(each)), None):
        return f"{_written_in(changed)} replaces a loss function"
    config: Any = base.config
    family, causal = config.model_type, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    both = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    reads_left = family not in both and (family in causal or kind in _names(_HEADS[-1:]))
    if family in _MEET or not (reads_left or family in _MASKED):
        return f"the effect of padding in {kind} is unknown"
    for part in _configs(config):
        if getattr(part, "output_router_logits", False):
            return "rows affect each other in the experts' balance loss"
        if (most := _same_up_to(part)) < math.inf and longest() > most:
            return "rotary embeddings depend on the longest row of the batch"
    return foreign_code(model)


def _functions(base: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yield the functions that the losses of transformers currently call."""
    yield from (functional.cross_entropy, functional.mse_loss, functional.binary_cross_entropy_with_logits)
    yield loss_utils.fixed_cross_entropy
    own = vars(sys.modules[type(base).__module__])
    for kind in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
        used = own.get(kind.__name__, kind)
        yield getattr(used, "forward", used)


def _is_of(function: Callable[..., Any]) -> bool:
    """True if a function belongs to a package whose modules compute each row independently."""
    return _package(_written_in(function)) in _OURS


def is_of_library(module: str | None) -> bool:
    """True if a module, by name, is of Python, or of a library that many programs share."""
    package = _package(module or "builtins")
    return package in _OURS or package in sys.stdlib_module_names or package in ("datasets", "numpy", "pyarrow")


def cuts_left(model: nn.Module) -> bool:
    """True if a model's padding on the left can be cut without passing it the remaining positions."""
    config = getattr(unwrap(model).get_base_model(), "config", None)
    known = getattr(config, "model_type", "") in _LEFT
    return known and all(_same_up_to(part) == math.inf for part in _configs(config))


def foreign_modes() -> list[type]:
    """Return the active modes of torch that may change results and come from none of the known packages."""
    modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())  # type: ignore[no-untyped-call]
    return [type(mode) for mode in modes if _package(type(mode).__module__) not in _OURS]


def foreign_code(model: nn.Module) -> str:
    """Return why modules, parameters or hooks may mix rows, for people; empty if all are of known packages."""
    for reason, _ in foreign_objects(model):
        return reason
    held = held_nodes({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    return f"the gradient node of {held[0]} is held, as by a hook" if held else ""


def foreign_objects(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield modes, hooks and modules that may mix rows and are of no known package, and gradient hooks; first why."""
    for mode in foreign_modes():
        yield f"{mode.__module__}.{mode.__name__} overrides functions", mode
    every: Any = _global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks
    for hook in (hook for hooks in every for hook in hooks.values()):
        if not _is_of(hook):
            yield f"{_written_in(hook)} has a global module hook", hook
    for name, module in model.named_modules():
        own, kind = vars(module), type(module)
        hooks = [hook for kept in HOOKS for hook in own[kept].values()]
        for function in (*hooks, own["forward"]) if "forward" in own else hooks:
            if not _is_of(function):
                yield f"{_written_in(function)} hooks {name or 'the model'} or replaces its forward", function
        used: Any = kind
        if issubclass(kind, _NormBase) and "Batch" in kind.__name__:
            yield f"rows affect each other in {kind.__name__}", module
        elif _package(kind.__module__) not in _OURS or not (_is_of(used.forward) and _is_of(used.__call__)):
            yield f"{kind.__module__}.{kind.__name__} is a custom module", module
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            every = parameter._backward_hooks or {}, parameter._post_accumulate_grad_hooks or {}
            yield from ((f"{name} has a gradient hook", hook) for hooks in every for hook in hooks.values())


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks."""


def _names(mappings: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the class names in transformers' mappings, whose values are one name or several."""
    values = (value for mapping in mappings for value in mapping.values())
    return {name for value in values for name in (value if isinstance(value, tuple | list) else (value,))}


def _configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and those of its submodels, such as the text model's."""
    yield config
    yield from (part for name, part in vars(config).items() if name.endswith("_config") and hasattr(part, "to_dict"))


def _same_up_to(config: Any) -> float:
    """Return the tokens up to which a model's rotary embeddings do not depend on the length of the batch."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [one for one in (given, *given.values()) if isinstance(one, Mapping)]
    if not any(one.get("rope_type") in _LENGTHS_CHANGE for one in each):
        return math.inf
    bounds = [one["original_max_position_embeddings"] for one in each if "original_max_position_embeddings" in one]
    return float(
        min(bounds, default=getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    )


def _written_in(function: Callable[..., Any]) -> str:
    """Return the module that defines a function; decorators cannot disguise it."""
    while True:
        inner = function.func if isinstance(function, partial) else getattr(function, "__func__", None)
        inner = inner or getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    scope = getattr(function, "__globals__", None)
    return str(scope["__name__"]) if scope else type(function).__module__


def _package(module: str) -> str:
    return module.partition(".")[0]
