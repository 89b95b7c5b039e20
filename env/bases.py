"""The small pretrained transformers on which the proxy fine-tunes run; they ship with the package."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AssetError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASES_FOLDER = Path(__file__).parent / "bases"


@dataclass(frozen=True)
class ProxyBase:
    """One proxy architecture, a causal language model over bytes.

    Attributes:
        name: folder below `env/bases`.
        target_modules: the linear layers that carry an adapter, as in `peft.LoraConfig`.
        config: keyword arguments of the transformers configuration.
    """

    name: str
    target_modules: tuple[str, ...]
    config: dict[str, Any]


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PROXY_BASES = {
    base.name: base
    for base in (
        ProxyBase(
            name="llama-4x64",
            target_modules=_LLAMA,
            config={
                "model_type": "llama",
                "vocab_size": 256,
                "hidden_size": 64,
                "intermediate_size": 176,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
                "bos_token_id": None,
                "eos_token_id": None,
            },
        ),
    )
}


def find_base(name: str) -> ProxyBase:
    """The proxy base of that name; UnknownNameError if there is none."""
    if name not in PROXY_BASES:
        raise UnknownNameError.of("proxy base", name, PROXY_BASES)
    return PROXY_BASES[name]


def new_base_model(base: ProxyBase) -> PreTrainedModel:
    """An untrained model of the base's architecture, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(base.config)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@functools.lru_cache(maxsize=1)
def _weights(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    path = BASES_FOLDER / name / "model.safetensors"
    if not path.is_file():
        raise AssetError(
            f"The weights of proxy base {name!r} are missing ({path}). Reinstall rankpilot, or make them with "
            f"`python -m rankpilot.env.pretrain {name}`."
        )
    return load_file(path)


def load_base_model(name: str) -> PreTrainedModel:
    """A fresh copy of a pretrained proxy base, frozen, in evaluation mode, fp32."""
    model = new_base_model(find_base(name))
    weights = {key: value.float() for key, value in _weights(name).items()}
    _, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise AssetError(f"The weights of proxy base {name!r} do not fit its architecture: {unexpected[:3]}.")
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()
