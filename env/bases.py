"""The proxy bases, small pretrained byte-level transformers: their models with LoRA adapters, and the cost of plans."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from ..common.errors import AssetError, UnknownNameError
from ..lora.targets import TargetModule, find_target_modules
from .tasks import POSITIONS

MASK_TOKEN = 256
"""Token id of a masked byte in masked language models."""


@dataclass(frozen=True)
class ProxyBase:
    """One proxy architecture, a byte-level language model.

    Attributes:
        name: folder below `env/weights`.
        family: "llama", "bert" or "gpt2", as in transformers.
        depth: number of layers.
        target_modules: names of the target modules, as in `peft.LoraConfig`.
        config: keyword arguments of the transformers configuration.
    """

    name: str
    family: str
    depth: int
    target_modules: tuple[str, ...]
    config: dict[str, Any]

    @property
    def masked(self) -> bool:
        """True for a masked language model, False for a causal one."""
        return self.family == "bert"


NARROW = 64
"""Layers up to this width are initialized with standard deviation .06; at the usual .02 they learn nothing."""


def _llama(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": 256, "hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": depth,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return ProxyBase(f"llama-{depth}x{width}", "llama", depth, targets, config)


def _bert(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": MASK_TOKEN + 1, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
        "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.06 if width <= NARROW else 0.02, "pad_token_id": None,
    }  # fmt: skip
    targets = ("query", "key", "value", "output.dense", "intermediate.dense")
    return ProxyBase(f"bert-{depth}x{width}", "bert", depth, targets, config)


def _gpt2(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": 256, "n_embd": width, "n_layer": depth, "n_head": 4, "n_positions": POSITIONS, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.06 if width <= NARROW else 0.02,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return ProxyBase(f"gpt2-{depth}x{width}", "gpt2", depth, ("c_attn", "c_proj", "c_fc"), config)


_NARROW = tuple(make(depth, width) for make in (_llama, _bert, _gpt2) for depth in (4, 8) for width in (32, 64))
_WIDE = (_llama(8, 256), _gpt2(4, 384))

PROXY_BASES = {base.name: base for base in (*_NARROW, *_WIDE)}
"""Bases by name. The wide ones are for benchmarks, held out to evaluate rules: see `tools/pretrain.py`."""


def find_base(name: str) -> ProxyBase:
    """Return the proxy base of that name, or raise UnknownNameError."""
    if name not in PROXY_BASES:
        raise UnknownNameError.of("proxy base", name, PROXY_BASES)
    return PROXY_BASES[name]


BASES_FOLDER = Path(__file__).parent / "weights"


def new_base_model(base: ProxyBase) -> PreTrainedModel:
    """Return an untrained model of the base's architecture, in fp32."""
    config = AutoConfig.for_model(base.family, **base.config)
    kind = AutoModelForMaskedLM if base.masked else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
    return model


def weights_file(name: str) -> Path:
    """Return the path of a proxy base's weights, or raise AssetError if it is missing."""
    path = BASES_FOLDER / name / "model.safetensors"
    if not path.is_file():
        raise AssetError(
            f"The weights of proxy base {name!r} are missing ({path}). The wheel contains only those for "
            f"training and validation. In a checkout, `git checkout a1dc0e36 -- env/weights/{name}` restores "
            f"the original ones, and `python -m tools.pretrain {name}` makes new ones."
        )
    return path


@lru_cache(maxsize=1)
def _weights(name: str) -> dict[str, Any]:
    return load_file(weights_file(name))


def load_base_model(name: str) -> PreTrainedModel:
    """Return a fresh copy of a pretrained proxy base, frozen, in evaluation mode, fp32."""
    model, weights = new_base_model(find_base(name)), {key: value.float() for key, value in _weights(name).items()}
    _, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise AssetError(f"The weights of proxy base {name!r} do not match its architecture: {unexpected[:3]}.")
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


ALPHA = 16
"""`lora_alpha` of proxy runs: the scaling is 16 / rank, 2 at rank 8, the most common setting among PEFT users."""


@lru_cache(maxsize=16)
def adapted_base(name: str) -> tuple[PeftModel, list[TargetModule]]:
    """Return the proxy base with a LoRA pair on every target module; one per process, as episodes run one at a time."""
    base = find_base(name)
    names, is_gpt2 = list(base.target_modules), base.family == "gpt2"
    config = LoraConfig(r=8, lora_alpha=ALPHA, target_modules=names, fan_in_fan_out=is_gpt2)
    model = get_peft_model(load_base_model(name), config)
    return model, find_target_modules(model)
