"""The small pretrained transformers on which the proxy fine-tunes run; they ship with the package.

A proxy base with LoRA adapters, and what plans on it cost.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..cost.batch_shape import BatchShape
from ..cost.calibration import calibrate
from ..cost.cost import ParameterCost, UntimedCost
from ..cost.model import MemoryModel
from ..errors import AssetError, UnknownNameError
from ..lora.targets import TargetModule, find_target_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Unit = Literal["bytes", "parameters"]
"""What a budget of a proxy task counts."""

BASES_FOLDER = Path(__file__).parent / "weights"


MASK_TOKEN = 256
"""What masked language models read in place of a hidden byte."""


@dataclass(frozen=True)
class ProxyBase:
    """One proxy architecture, a language model over bytes.

    Attributes:
        name: folder below `env/weights`.
        family: "llama", "bert" or "gpt2", as transformers calls it.
        depth: layers.
        target_modules: the linear layers that carry an adapter, as in `peft.LoraConfig`.
        config: keyword arguments of the transformers configuration.
    """

    name: str
    family: str
    depth: int
    target_modules: tuple[str, ...]
    config: dict[str, Any]

    @property
    def masked(self) -> bool:
        """Whether it fills in masked bytes, instead of predicting the next one."""
        return self.family == "bert"


POSITIONS = 128
"""The longest window that a base can read."""


def _llama(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": {32: 88, 64: 176}[width],
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return ProxyBase(f"llama-{depth}x{width}", "llama", depth, targets, config)


def _bert(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": MASK_TOKEN + 1,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.06,  # for narrow layers; the usual 0.02 learns nothing here
        "pad_token_id": None,
    }
    targets = ("query", "key", "value", "output.dense", "intermediate.dense")
    return ProxyBase(f"bert-{depth}x{width}", "bert", depth, targets, config)


def _gpt2(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": 256,
        "n_embd": width,
        "n_layer": depth,
        "n_head": 4,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return ProxyBase(f"gpt2-{depth}x{width}", "gpt2", depth, ("c_attn", "c_proj", "c_fc"), config)


PROXY_BASES = {
    base.name: base
    for base in (make(depth, width) for make in (_llama, _bert, _gpt2) for depth in (4, 8) for width in (32, 64))
}
"""Bases by name."""


def find_base(name: str) -> ProxyBase:
    """The proxy base of that name; UnknownNameError if there is none."""
    if name not in PROXY_BASES:
        raise UnknownNameError.of("proxy base", name, PROXY_BASES)
    return PROXY_BASES[name]


def new_base_model(base: ProxyBase, *, causal: bool = False) -> PreTrainedModel:
    """An untrained model of the base's architecture, in fp32.

    Args:
        base: the architecture.
        causal: a masked language model as a decoder, with the same weights by name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    config = AutoConfig.for_model(base.family, **base.config)
    if base.masked:
        config.is_decoder = causal
    kind = AutoModelForMaskedLM if base.masked and not causal else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config)
    return model


@functools.lru_cache(maxsize=1)
def _weights(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    path = BASES_FOLDER / name / "model.safetensors"
    if not path.is_file():
        raise AssetError(
            f"The weights of proxy base {name!r} are missing ({path}). Bases of the test split are in a "
            "checkout of the repository and not in the wheel: install rankpilot from one (pip install -e .)."
        )
    return load_file(path)


def load_base_model(name: str) -> PreTrainedModel:
    """A fresh copy of a pretrained proxy base, frozen, in evaluation mode, fp32."""
    return with_weights(find_base(name), _weights(name))


def with_weights(base: ProxyBase, weights: dict[str, Any]) -> PreTrainedModel:
    """A model of an architecture with these weights, frozen, in evaluation mode, fp32."""
    model = new_base_model(base)
    _, unexpected = model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    if unexpected:
        raise AssetError(f"The weights of proxy base {base.name!r} do not fit its architecture: {unexpected[:3]}.")
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


ALPHA = 16
"""`lora_alpha` of proxy runs: the scaling is 16 / rank, 2 at rank 8, PEFT users' most common setting."""


CALIBRATED_ROWS = 4
"""Rows from which on calibration records the same small steps, whatever their number."""


@lru_cache(maxsize=16)
def adapted_base(name: str) -> tuple[PeftModel, list[TargetModule]]:
    """The proxy base with a LoRA pair on every target module; one a process, since episodes run one after another."""
    base = find_base(name)
    config = LoraConfig(
        r=8,
        lora_alpha=ALPHA,
        target_modules=list(base.target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=base.family == "gpt2",
    )
    model = get_peft_model(load_base_model(name), config)
    return model, find_target_modules(model)


@lru_cache(maxsize=256)
def proxy_cost(base: str, rows: int, length: int, unit: Unit = "bytes", checkpointing: bool = False) -> UntimedCost:
    """What plans on a proxy base cost at one batch shape."""
    if unit == "parameters":
        return ParameterCost.of(adapted_base(base)[1])
    return proxy_memory(base, length, checkpointing).cost(BatchShape(rows, length))


@lru_cache(maxsize=64)
def proxy_memory(base: str, length: int, checkpointing: bool) -> MemoryModel:
    """Predicts the memory of any number of rows."""
    model, targets = adapted_base(base)
    tokens = torch.zeros(CALIBRATED_ROWS, length, dtype=torch.int64)
    inner = model.get_base_model()
    if not checkpointing:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens})
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training alone; the bases have no dropout
    try:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens})
    finally:
        inner.gradient_checkpointing_disable()
        if hasattr(inner, "_require_grads_hook"):  # set by enabling; it would make all later steps save everything
            inner.disable_input_require_grads()
        model.eval()
